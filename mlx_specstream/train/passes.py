"""How the rows of a batch run through the model in training.

V1 mask: the main rows run as ever, then the streams of the chosen hosts alone attend to the K/V that
was left there (deferred placement, with many hosts at once).

    main_pass ──> M^{N-Ns}, K/V ──> stream_hidden

[P] mask: main rows attend to their own streams, so both run together in the MSA layers, one segment
of the completion after the other (P App. C): a segment sees the main rows of the segments before it,
and streams are held for one segment only. Prompt rows have no streams, as in decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..model.cache import FixedPrefix, NoStore
from ..model.rows import Rows, causal_rows
from ..model.seams import Pass, Seams
from .data import Batch

SEGMENT = 64  # completion rows whose streams run at once under the [P] mask


@dataclass(frozen=True)
class MainPass:
    """What the main rows of a batch left.

    Shapes: cut_hidden M^{N-Ns} [B, L, E]; last_hidden, after the last layer [B, L, E]; stores, per
    layer where its K/V lie (MSA layers) or nothing.
    """

    cut_hidden: mx.array
    last_hidden: mx.array
    stores: list


@dataclass(frozen=True)
class Hidden:
    """Hidden states that the losses of a batch read.

    Shapes: cut [B, L, E]; main, after the last layer [B, L, E], or [B, L', E] where no row behind L'
    is learned; streams of the batch's hosts, after the last layer [B, g * P, E], stream-major.
    """

    cut: mx.array
    main: mx.array
    streams: mx.array


def run_batch(seams: Seams, batch: Batch) -> Hidden:
    """Run a batch as its streams are to be used: V1 or [P]."""
    tokens, hosts = mx.array(batch.tokens), mx.array(batch.hosts)
    if seams.streams.config.main_sees_streams:
        return planned_pass(seams, tokens, hosts, batch.labels >= 0, batch.cut_hidden)
    main = main_pass(seams, tokens, batch.cut_hidden)
    roots = following(tokens, hosts)
    streams = stream_hidden(seams, main.cut_hidden, main.stores, hosts, roots)
    return Hidden(main.cut_hidden, main.last_hidden, streams)


def main_pass(seams: Seams, tokens: mx.array, cut_hidden: mx.array | None = None) -> MainPass:
    """Run the main rows of tokens [B, L] with ordinary attention.

    Args:
        cut_hidden: M^{N-Ns} [B, L, E], where it is known; the layers below are skipped.
    """
    rows = causal_rows(0, tokens.shape[1])
    if cut_hidden is None:
        run = Pass(rows, take=slice(0, 1))
        seams.forward(run, tokens)
    else:
        run = Pass(rows, first=seams.cut, enters=cut_hidden, take=slice(0, 1))
        seams.forward(run)
    stores = [
        FixedPrefix(*context.fresh) if index >= seams.cut else NoStore()
        for index, context in enumerate(run.contexts)
    ]
    return MainPass(run.cut_hidden, run.last_hidden, stores)


def base_pass(seams: Seams, tokens: mx.array) -> tuple[mx.array, list]:
    """``main_pass`` for those who want streams alone: (cut_hidden, stores)."""
    main = main_pass(seams, tokens)
    return main.cut_hidden, main.stores


def following(tokens: mx.array, hosts: mx.array) -> mx.array:
    """The tokens [B, P] that the text [B, L] has behind hosts [B, P]: their roots.

    Nobody knows that of the last row; there it is the row's own token.
    """
    return mx.take_along_axis(tokens, mx.minimum(hosts + 1, tokens.shape[1] - 1), axis=1)


def stream_hidden(
    seams: Seams, cut_hidden: mx.array, stores: list, hosts: mx.array, roots: mx.array
) -> mx.array:
    """Last hidden states of the streams of ``hosts`` [B, P] -> [B, g * P, E], stream-major.

    Args:
        roots: ``following`` them, int32 [B, P].
    """
    at_hosts = mx.take_along_axis(cut_hidden, hosts[:, :, None], axis=1)  # [B, P, E]
    run = seams.run_streams(at_hosts, hosts, roots, stores, prefix=cut_hidden.shape[1])
    return run.last_hidden


def planned_pass(
    seams: Seams,
    tokens: mx.array,
    hosts: mx.array,
    plans: np.ndarray,
    cut_hidden: mx.array | None = None,
) -> Hidden:
    """Run main rows that see their own streams ([P] Eq. 1).

    Args:
        tokens: int32 [B, L]; hosts: rows whose streams are wanted, int32 [B, P].
        plans: which rows have streams, bool [B, L]: those of the completions.
        cut_hidden: of ``main_pass``.
    """
    (B, L), (_, P), g = tokens.shape, hosts.shape, seams.streams.config.num_streams
    columns = np.flatnonzero(plans.any(axis=0))
    begin, end = int(columns[0]), int(columns[-1]) + 1
    main, streams = [], []
    stores = None if cut_hidden is None else [NoStore()] * seams.num_layers
    for a, b in _segments(begin, end):

        def at_cut(hidden: mx.array, rows: Rows, a=a, b=b) -> tuple[mx.array, Rows]:
            nonlocal cut_hidden
            if cut_hidden is None:
                cut_hidden = hidden
            hidden, rows = cut_hidden[:, a:b], causal_rows(a, b - a)
            if a < begin:
                return hidden, rows
            hidden, rows = seams.add_streams(hidden, rows)
            return hidden, _where_planned(rows, mx.array(plans[:, a:b]))

        if stores is None:  # the lower layers run here, over all rows
            run = Pass(causal_rows(0, L), at_cut=at_cut, take=slice(0, 1))
            seams.forward(run, tokens)
            stores = [NoStore()] * seams.num_layers
        else:
            enters, rows = at_cut(None, None)
            run = Pass(rows, first=seams.cut, enters=enters, take=slice(0, 1))
            seams.forward(run, stores=stores)
        n = b - a
        stores = [
            _longer(store, *(x[:, :, :n] for x in context.fresh)) if index >= seams.cut else store
            for index, (store, context) in enumerate(zip(stores, run.contexts, strict=True))
        ]
        main.append(run.last_hidden[:, :n])
        if a >= begin:
            streams.append(run.last_hidden[:, n:].reshape(B, g, n, -1))
    of_rows = mx.concatenate(streams, axis=2)  # [B, g, end - begin, E]
    at = mx.maximum(hosts - begin, 0)[:, None, :, None]
    chosen = mx.take_along_axis(of_rows, mx.broadcast_to(at, (B, g, P, 1)), axis=2)
    return Hidden(cut_hidden, mx.concatenate(main, axis=1), chosen.reshape(B, g * P, -1))


def _segments(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The rows in front of all completions, then segments of what follows."""
    if begin:
        yield 0, begin
    for at in range(begin, end, SEGMENT):
        yield at, min(at + SEGMENT, end)


def _where_planned(rows: Rows, plans: mx.array) -> Rows:
    """The rows of ``with_streams``, in which only the nodes with ``plans`` [B, n] see their streams."""
    n, sees = rows.main, mx.broadcast_to(rows.sees, (plans.shape[0], *rows.sees.shape[1:]))
    own = sees[:, :n, n:] & plans[:, :, None]
    nodes = mx.concatenate([sees[:, :n, :n], own], axis=2)
    return replace(rows, sees=mx.concatenate([nodes, sees[:, n:]], axis=1))


def _longer(store: NoStore | FixedPrefix, keys: mx.array, values: mx.array) -> FixedPrefix:
    return FixedPrefix(*store.update_and_fetch(keys, values))
