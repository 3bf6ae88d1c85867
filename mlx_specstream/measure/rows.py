"""What the rows of a pass cost on this machine: whole steps of the real decode loop, timed.

Every repeat runs the whole model, so the caches see what they see in decoding: weights come from
memory again each time, unless the model is small enough to stay in a cache, which then helps plain
decoding too. Sizes are interleaved, so that a slow moment of the machine does not fall on one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit

from ..decode.choose import Greedy
from ..decode.compiling import compiled_at_once
from ..decode.costs import Costs, gammas_below
from ..decode.decoder import Decoder
from ..decode.draft import Guesses
from ..decode.plan import NextPass, placements
from ..decode.step import WIDE
from ..decode.tree import TreeShape
from ..errors import BadArgument
from ..model.cache import make_prompt_cache
from ..model.seams import Seams

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 512, 2048)
WARM_ROUNDS = 1  # in the first round passes are traced and compiled
# The prompt's own step, and the first with a tree: it makes buffers, and finds memory laid out for
# another size.
SETTLING = 2
TIMED = 3  # steps
FEWER = slice(1, 4)  # of the sizes: where a step with fewer streams is timed


def check_sizes(name: str, sizes, least: int) -> tuple[int, ...]:
    """Ascending whole numbers; anything else raises BadArgument."""
    sizes = tuple(sorted(set(sizes)))
    if sizes[0] < least or (name == "rows" and (sizes[0] != 1 or len(sizes) < 2)):
        rule = "hold 1 and a larger number" if name == "rows" else f"be at least {least}"
        raise BadArgument(f"[{name}] must {rule}; got {' '.join(map(str, sizes))}.")
    return sizes


@dataclass(frozen=True)
class _Script:
    """The same pass again and again."""

    nodes: int
    streams: bool
    inline: bool
    gamma: int | None = None

    def candidates(self, vocabulary: int) -> int:
        return min(15, vocabulary)

    def next_pass(self, guesses, text, context: int) -> NextPass:
        tree = TreeShape("best", max(2, self.nodes))
        nodes = 1 if guesses is None else self.nodes
        return NextPass(tree, nodes, self.inline, self.streams, gamma=self.gamma)

    def observe(self, plan, context, accepted) -> None:
        pass


class _Probe(Decoder):
    """A decoder whose draft is always there, whether streams run or not."""

    def __init__(self, seams: Seams, stores: list, script: _Script):
        with_streams = seams.streams is not None
        super().__init__(seams, stores, [1], Greedy(), script, streams=with_streams)
        depth = seams.streams.config.num_streams if seams.streams else 4
        count = script.candidates(seams.vocabulary_size)
        if depth == 1:  # every node below the root is a guess of the one stream
            count = min(max(count, script.nodes - 1), seams.vocabulary_size)
        conditioned = with_streams and seams.streams.config.condition_rank > 0
        if conditioned:
            count = min(max(count, WIDE), seams.vocabulary_size)
        tokens = np.arange(depth * count).reshape(depth, count) % seams.vocabulary_size
        shape = (depth, count, count) if conditioned else (depth, count)
        logprobs = np.broadcast_to(np.linspace(-0.5, -6, count, dtype=np.float32), shape)
        self._fixed = Guesses(mx.array(tokens.astype(np.int32)), mx.array(logprobs))
        self.script = script

    def _streams(self) -> Guesses | None:
        found = super()._streams()
        if self.script.nodes == 1 or self.place == 0:
            return None
        # The draft is the same for all, so that all have the same work; the streams' own is waited
        # for, as it would be.
        if found is not None:
            mx.eval(found)
        return self._fixed


def measure_costs(
    seams: Seams,
    *,
    rows: tuple[int, ...] = ROWS,
    contexts: tuple[int, ...] = CONTEXTS,
    repeats: int = 5,
    inline: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """Time passes of every size behind every context, with and without streams.

    Args:
        rows: nodes of a pass, ascending from 1.
        contexts: tokens before the pass.
        repeats: rounds over all kinds, each with ``TIMED`` timed steps of every kind.
        inline: time inline streams too (up to 16 nodes; beyond that they only get worse).
        progress: called with (kinds of steps done, in all).

    Returns:
        Lower quartiles, in milliseconds.
    """
    has_streams = seams.streams is not None
    possible = placements(seams.streams.config) if has_streams else ()
    deferrable, inline = "deferred" in possible, inline and "inline" in possible
    few: tuple[int, ...] = ()
    kinds = [_Script(n, False, False) for n in rows]
    if deferrable:
        kinds += [_Script(n, True, False) for n in rows]
        few = gammas_below(seams.streams.config.num_streams)
        kinds += [_Script(n, True, False, gamma) for n in rows[FEWER] for gamma in few]
    if inline or possible == ("inline",):
        kinds += [_Script(n, True, True) for n in rows if n <= 16]
    total, done = len(contexts) * (repeats + WARM_ROUNDS), count(1)
    stream = generation_stream  # memory is wired and passes queued as in decoding
    with wired_limit(seams.model, [stream]), mx.stream(stream), compiled_at_once(seams):
        tables = [
            _times(seams, kinds, context, repeats, lambda: progress(next(done), total))
            for context in contexts
        ]

    def line(times: dict[_Script, float], inline: bool) -> tuple[float, ...]:
        """What streams add at each size: their step less the same step without them."""
        added = [
            times[_Script(n, True, inline)] - times[_Script(n, False, False)]
            for n in rows
            if _Script(n, True, inline) in times
        ]
        if not inline:  # one node's streams, whatever the size of the tree
            return (max(0.0, float(np.median(added))),) * len(rows)
        added = np.maximum.accumulate(np.maximum(added, 0.0)).tolist()
        last = len(added) - 1  # beyond what was timed: at the last one's price per row
        return (*added, *(added[last] * n / rows[last] for n in rows[last + 1 :]))

    def saved(times: dict[_Script, float]) -> tuple[float, ...]:
        """What fewer streams save, which is never less the fewer they are."""
        alike = rows[FEWER]
        found = [
            np.median([times[_Script(n, True, False)] - times[_Script(n, True, False, gamma)]
                       for n in alike])
            for gamma in few
        ]  # fmt: skip
        return tuple(np.maximum.accumulate(np.maximum(found, 0.0)[::-1])[::-1].tolist())

    # More rows never cost less: where they seem to, it is noise.
    passes = tuple(
        tuple(np.maximum.accumulate([times[_Script(n, False, False)] for n in rows]).tolist())
        for times in tables
    )
    inlined = None
    if any(kind.inline for kind in kinds):
        inlined = tuple(line(times, True) for times in tables)
    nothing = tuple((0.0,) * len(rows) for _ in tables)
    deferred = tuple(line(times, False) for times in tables) if deferrable else inlined or nothing
    return Costs(
        rows=rows,
        contexts=contexts,
        pass_ms=passes,
        deferred_ms=deferred,
        inline_ms=inlined,
        plain_ms=tuple(line[0] for line in passes),
        measured=True,
        gammas=few,
        saved_ms=tuple(saved(times) for times in tables) if few else (),
    )


def _times(seams, kinds, context: int, repeats: int, step_done) -> dict[_Script, float]:
    """Milliseconds of a step of each kind behind so many tokens."""
    stores = _prefilled(seams, context)
    times: dict[_Script, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + WARM_ROUNDS):
        for kind in kinds:
            # Each begins behind the same rows, in buffers that live no longer than it does.
            probe = _Probe(seams, [copy.copy(store) for store in stores], kind)
            for step in range(SETTLING + TIMED):
                tic = time.perf_counter()
                probe.step(1 << 30, ())
                if step >= SETTLING and repeat >= WARM_ROUNDS:
                    times[kind].append(time.perf_counter() - tic)
            del probe
        step_done()
    del stores
    mx.clear_cache()
    # Whatever else the machine does can only add time: the lower quartile, not the median.
    return {kind: 1e3 * float(np.quantile(t, 0.25)) for kind, t in times.items()}


def _prefilled(seams: Seams, context: int) -> list:
    """K/V of so many tokens, one store per layer."""
    stores = make_prompt_cache(seams.model)
    tokens = mx.arange(context)[None] % seams.vocabulary_size
    for begin in range(0, context, 512):
        seams.model(tokens[:, begin : begin + 512], cache=stores)
        mx.eval([store.state for store in stores])
    return stores
