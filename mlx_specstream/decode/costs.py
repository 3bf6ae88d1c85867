"""costs: what passes and streams cost on one machine, in milliseconds. Plain NumPy, no model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import BadArgument

# Rows of a pass -> its cost in plain tokens, where nothing was measured on the machine itself.
# GPU: others' reports for dense 4-bit models on M3 to M5, the slower ones of them (mlx#3852, #3863,
# mlxcel#1204): two or three rows nearly free, 4-5 rows 1.2-1.75, 8 rows 1.7-2.8, 16 rows 4.
# CPU: tree passes beside the stock forward, OpenBLAS on two cores (docs/log.md).
CURVES = {
    "gpu": {1: 1.0, 2: 1.03, 3: 1.1, 4: 1.25, 5: 1.35, 6: 1.8, 8: 2.2, 16: 4.0},
    "cpu": {1: 1.21, 5: 1.5, 8: 1.51, 16: 1.9, 32: 2.65},
}
# M2 with affine weights (mlx-lm#990: 1.725 for two rows), or a CPU without a fast BLAS.
LINEAR = {1: 1.0, 2: 1.72, 8: 6.1}
# The host's share of a pass, in plain tokens: a speculative loop waits for each pass, plain decoding
# does not (4%: mlx#972, #992). The CPU curve has it inside.
HOST = {"gpu": 0.05, "cpu": 0.0}
# What the small second pass of deferred streams costs beyond its rows, in plain tokens. CPU: measured
# (docs/log.md: 7.8 ms for two of eight layers, 18 ms a token). GPU: a guess.
LAUNCH = {"gpu": 0.03, "cpu": 0.1}
GUESSES = 0.04  # plain tokens: the likeliest tokens of each stream, and the tree (docs/log.md)


@dataclass(frozen=True)
class Costs:
    """Milliseconds, for one machine, model and quantisation.

    Tables are indexed [context][rows]; between their points costs are linear. Below the first
    context they are its own; beyond the last point they go on as between the last two, and never
    fall.

    Args:
        rows: nodes of a pass at the measured points, ascending from 1, at least two.
        contexts: tokens before the pass at the measured points, ascending.
        pass_ms: a pass that verifies so many nodes, the host's work included, without streams.
        deferred_ms: what deferred streams and the draft made from them add to a step.
        inline_ms: the same for inline streams; None: not measured.
        plain_ms: one token of plain decoding [context].
        measured: False for a curve that was not measured on this machine.
        gammas: numbers of streams, ascending, that may run instead of all, where they are deferred.
        saved_ms: what a step saves with so few [context][gammas], beyond the last context what it
            saves there.

    Raises:
        BadArgument: a value breaks its rule.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    pass_ms: tuple[tuple[float, ...], ...]
    deferred_ms: tuple[tuple[float, ...], ...]
    inline_ms: tuple[tuple[float, ...], ...] | None
    plain_ms: tuple[float, ...]
    measured: bool
    gammas: tuple[int, ...] = ()
    saved_ms: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        for name, least in (("rows", 1), ("contexts", 0)):
            object.__setattr__(self, name, _ascending(name, getattr(self, name), least))
        if self.rows[0] != 1 or len(self.rows) < 2:
            _refuse("rows", "start with 1 and hold two or more numbers", self.rows)
        for name in ("pass_ms", "deferred_ms", "inline_ms"):
            table = getattr(self, name)
            if table is None and name == "inline_ms":
                continue
            if not isinstance(table, list | tuple) or len(table) != len(self.contexts):
                _refuse(name, f"hold one list for each of {len(self.contexts)} contexts", table)
            least = 0.0 if name == "pass_ms" else -math.inf  # measured differences may be noise
            table = tuple(_numbers(name, line, len(self.rows), least) for line in table)
            object.__setattr__(self, name, table)
        plain = _numbers("plain_ms", self.plain_ms, len(self.contexts), 0.0)
        object.__setattr__(self, "plain_ms", plain)
        if not isinstance(self.measured, bool):
            _refuse("measured", "be true or false", self.measured)
        gammas = () if self.gammas in ((), []) else _ascending("gammas", self.gammas, 1)
        known = len(self.contexts) if gammas else 0
        if not isinstance(self.saved_ms, list | tuple) or len(self.saved_ms) != known:
            _refuse("saved_ms", f"hold one list for each of {known} contexts", self.saved_ms)
        saved = tuple(_numbers("saved_ms", line, len(gammas), -math.inf) for line in self.saved_ms)
        object.__setattr__(self, "gammas", gammas)
        object.__setattr__(self, "saved_ms", saved)

    def pass_at(self, nodes, context: int):
        """A pass over ``nodes`` (int, or an array of them) behind ``context`` tokens, in ms."""
        return self._read(self.pass_ms, nodes, context)

    def streams_at(self, placement: str, nodes, context: int, gamma: int | None = None):
        """What streams add to such a pass in a placement, in ms, never below 0; inf: unknown.

        Args:
            gamma: only so many of them, one of ``gammas``; None: all.
        """
        table = self.deferred_ms if placement == "deferred" else self.inline_ms
        if table is None or (gamma and placement != "deferred"):
            return np.full(np.shape(nodes), np.inf)[()]
        ms = self._read(table, nodes, context)
        if gamma:
            saved = [line[self.gammas.index(gamma)] for line in self.saved_ms]
            ms = ms - np.interp(context, self.contexts, saved)  # noise is not to be drawn out
        return np.maximum(ms, 0.0)

    def plain_at(self, context: int) -> float:
        """A token of plain decoding behind ``context`` tokens, in ms."""
        return float(_line(context, self.contexts, self.plain_ms))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Costs:
        """Strict: raises BadArgument for a missing or unknown key too."""
        known = {f.name for f in fields(cls)}
        if isinstance(data, dict):  # a profile from before fewer streams were timed
            data = {"gammas": (), "saved_ms": (), **data}
        if not isinstance(data, dict) or set(data) != known:
            got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise BadArgument(f"[Costs] keys must be exactly {sorted(known)}; got {got}.")
        return cls(**data)

    def _read(self, table, nodes, context: int):
        nodes = np.asarray(nodes, dtype=np.float64)
        lines = np.stack([_line(nodes, self.rows, line) for line in table])  # [context, ...]
        if len(self.contexts) == 1:
            return lines[0]
        above = int(np.searchsorted(self.contexts, context).clip(1, len(self.contexts) - 1))
        low, high = self.contexts[above - 1], self.contexts[above]
        share = max(0.0, (context - low) / (high - low))
        rise = lines[above] - lines[above - 1]
        if share > 1.0:  # beyond the last context
            return lines[above] + np.maximum(rise, 0.0) * (share - 1.0)
        return lines[above - 1] + rise * share


def gammas_below(streams: int) -> tuple[int, ...]:
    """How many of so many streams may run instead of all: about a third and two thirds of them."""
    return tuple(sorted({-(-streams // 3), -(-2 * streams // 3)} - {streams, 0}))


def default_costs(
    device: str,
    layers: int,
    msa_layers: int,
    *,
    streams: int = 4,
    head_share: float = 0.06,
    linear: bool = False,
) -> Costs:
    """A cautious curve for a machine on which nothing was measured; a plain token is 1.0.

    Args:
        device: ``"gpu"`` or ``"cpu"``.
        layers, msa_layers: of the model, and how many of them the streams run in.
        streams: gamma.
        head_share: of the head in a plain token.
        linear: rows cost nearly as much as tokens: M1 and M2 with affine quantisation, or a CPU
            without a fast BLAS.

    Raises:
        BadArgument: an unknown device.
    """
    if device not in CURVES:
        raise BadArgument(f"[device] must be one of {', '.join(CURVES)}; got '{device}'.")
    curve = LINEAR if linear else CURVES[device]
    return modelled_costs(
        tuple(curve),
        tuple(curve.values()),
        layers=layers,
        msa_layers=msa_layers,
        streams=streams,
        head_share=head_share,
        host=HOST[device],
        launch=LAUNCH[device],
    )


def modelled_costs(
    rows: tuple[int, ...],
    curve: tuple[float, ...],
    *,
    layers: int,
    msa_layers: int,
    streams: int,
    head_share: float,
    host: float,
    launch: float,
) -> Costs:
    """Costs from a curve of passes alone, in plain tokens; the streams' part is arithmetic.

    Deferred streams are a pass of ``streams`` rows through ``msa_layers`` of ``layers`` and the head.
    Inline ones are (1 + streams) rows a node in those layers instead of one, and the same head.
    """
    share = (1.0 - head_share) * msa_layers / layers
    after = head_share * float(_line(streams, rows, curve)) + GUESSES
    deferred = share * float(_line(streams, rows, curve)) + launch + after
    fewer = gammas_below(streams)
    dearer = _line(streams, rows, curve) - np.asarray([_line(g, rows, curve) for g in fewer])
    n = np.asarray(rows, dtype=np.float64)
    inline = share * (_line((1 + streams) * n, rows, curve) - curve) + after
    return Costs(
        rows=tuple(rows),
        contexts=(0,),
        pass_ms=(tuple(c + host for c in curve),),
        deferred_ms=((deferred,) * len(rows),),
        inline_ms=(tuple(inline.tolist()),),
        plain_ms=(1.0,),
        measured=False,
        gammas=fewer,
        saved_ms=(tuple((dearer * (share + head_share)).tolist()),) if fewer else (),
    )


def _line(x, xs, ys):
    """Piecewise linear; flat before the first point, with the last slope, if it rises, behind it."""
    y = np.interp(x, xs, ys)
    if len(xs) > 1:
        slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
        y = y + np.maximum(0.0, np.asarray(x, dtype=np.float64) - xs[-1]) * slope
    return y


def _refuse(name: str, rule: str, value) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + " ..."
    raise BadArgument(
        f"[Costs] '{name}' must {rule}; got {shown}. Measure anew: mlx-specstream tune."
    )


def _ascending(name: str, values, least: int) -> tuple[int, ...]:
    right = isinstance(values, list | tuple) and len(values) > 0
    right = right and all(type(x) is int and x >= least for x in values)
    if not right or any(a >= b for a, b in pairwise(values)):
        _refuse(name, f"be ascending whole numbers from {least} up", values)
    return tuple(values)


def _numbers(name: str, values, count: int, above: float) -> tuple[float, ...]:
    right = isinstance(values, list | tuple) and len(values) == count
    right = right and all(
        type(x) in (int, float) and math.isfinite(x) and x > above for x in values
    )
    if not right:
        rule = f"hold {count} finite numbers" + (" above 0" if above == 0 else "")
        _refuse(name, rule, values)
    return tuple(float(x) for x in values)
