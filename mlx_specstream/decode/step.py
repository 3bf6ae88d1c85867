"""One step of Speculative Streaming in array code: draft -> pass -> verify, then commit -> streams.

Nothing here waits for the device (a threshold of pruning is the exception), so that a step can be
compiled and the next one queued. ``decoder.py`` runs these two halves and does what is left for
the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ..model.cache import RowStore
from ..model.conditioning import below_root, change_below
from ..model.rows import Rows, causal_rows, tree_rows
from ..model.seams import Pass, Seams
from .choose import Greedy
from .draft import CopiedText, Guesses, draft
from .prune import PruneRule, edge_logprobs, nodes_to_keep
from .tree import Tree, TreeShape
from .verify import Accepted, accept

# At least so many guesses of a stream are scored again below each guess of the stream before. With 16
# instead a tree of eight nodes brings 0.3% more tokens; the scores cost 0.3 ms more.
WIDE = 8


@dataclass(frozen=True)
class PassShape:
    """What is fixed while a pass is traced.

    Args:
        nodes: rows of the tree.
        tree: which nodes there may be.
        inline: streams ride along with every kept node.
        prune: early-exit pruning, or None.
        depth: the deepest node there can be.
        lengths: per layer how many keys a row may look at.
        greedy: the choice is made within the pass.
        guard: smallest gap of two logits that is no near-tie; 0: none is.
    """

    nodes: int
    tree: TreeShape
    inline: bool
    prune: PruneRule | None
    depth: int
    lengths: tuple[int, ...]
    greedy: bool
    guard: float = 0.0


@dataclass
class Verified:
    """What a pass leaves on the device.

    Args:
        tree: the nodes that were verified (after pruning) [m].
        logits: of the main stream at them [m, V].
        hidden: M^{N-Ns} of the kept nodes [1, m, E], or inline the last states of their streams
            [1, g * m, E].
        kept: their indices among the nodes of the lower layers, int32 [m].
        fresh: per layer the K/V [1, K, n or m, D] of this pass.
        accepted: the outcome, where the choice was made within the pass.
    """

    tree: Tree
    logits: mx.array
    hidden: mx.array
    kept: mx.array
    fresh: list[tuple[mx.array, mx.array]]
    accepted: Accepted | None

    def of_node(self, node: int, inline: bool) -> mx.array:
        """``hidden`` of one node: its M^{N-Ns} [1, 1, E], or its streams' last states [1, g, E]."""
        return self.hidden[:, node :: self.tree.size] if inline else self.hidden[:, node][:, None]


class Said(NamedTuple):
    """What the streams of one node say.

    Shapes: logits [g, V] (or the draft vocabulary's columns); hidden, their last states [1, g, E].
    """

    logits: mx.array
    hidden: mx.array


def verify_pass(
    seams: Seams,
    shape: PassShape,
    root: mx.array,
    offset: mx.array,
    bases: list,
    guesses: Guesses | None,
    copied: CopiedText | None,
    keys: list[mx.array],
    values: list[mx.array],
) -> Verified:
    """Draft a tree below ``root``, run it through the model, accept what the main stream says.

    Args:
        root: the last known token, int32 []; offset: its position, int32 [].
        bases: per layer the position of key 0.
        keys, values: per layer the K/V buffers [1, K, capacity, D]; replaced in these lists.
    """
    tree = draft(root, guesses, copied, shape.tree, shape.nodes)
    kept = mx.arange(tree.size, dtype=mx.int32)
    main = tree

    def at_cut(hidden: mx.array, rows: Rows) -> tuple[mx.array, Rows]:
        nonlocal kept, main
        if shape.prune is not None:
            exit_logits = seams.head(seams.streams.exit_hidden(hidden))[0]
            kept = nodes_to_keep(tree, edge_logprobs(tree, exit_logits), shape.prune)
            hidden, rows, main = hidden[:, kept], rows.take(kept), tree.take(kept)
        run.cut_hidden = hidden
        return seams.add_streams(hidden, rows) if shape.inline else (hidden, rows)

    stores = _stores(offset, bases, shape.lengths, keys, values)
    rows = tree_rows(offset, tree.depth, tree.ancestors)
    run = Pass(rows, at_cut=at_cut, takes_main=True, decoding=True)
    logits = seams.forward(run, tree.tokens[None], stores)[0]  # [m, V]
    m = main.size
    _hand_over(stores, keys, values)
    return Verified(
        main,
        logits,
        run.last_hidden[:, m:] if shape.inline else _at_cut(run),
        kept,
        [
            (context.fresh[0][:, :, :m], context.fresh[1][:, :, :m])
            if index >= seams.cut
            else context.fresh
            for index, context in enumerate(run.contexts)
        ],
        judge(main, Greedy().scores(logits, main.depth, 0, 0), shape) if shape.greedy else None,
    )


def prompt_pass(
    seams: Seams,
    shape: PassShape,
    tokens: mx.array,
    offset: mx.array,
    bases: list,
    keys: list[mx.array],
    values: list[mx.array],
) -> Verified:
    """Run the end of a prompt, int32 [r], as ordinary tokens; the last one is the root."""
    r = tokens.size
    stores = _stores(offset, bases, shape.lengths, keys, values)
    run = Pass(causal_rows(offset, r), take=slice(r - 1, r), decoding=True)
    logits = seams.forward(run, tokens[None], stores)[0]  # [1, V]
    _hand_over(stores, keys, values)
    tree = draft(tokens[-1], None, None, shape.tree)
    scores = Greedy().scores(logits, tree.depth, 0, 0)
    return Verified(
        tree,
        logits,
        _at_cut(run)[:, -1:],
        mx.zeros((1,), mx.int32),
        [],
        judge(tree, scores, shape) if shape.greedy else None,
    )


def judge(tree: Tree, scores: mx.array, shape: PassShape) -> Accepted:
    """Accept the nodes that hold the argmax of ``scores`` [m, V] at their parents."""
    chosen = mx.argmax(scores, axis=-1).astype(mx.int32)
    sure = None
    if shape.guard:
        best = mx.take_along_axis(scores, chosen[:, None], axis=-1)
        others = mx.put_along_axis(
            scores, chosen[:, None], mx.array(-mx.inf, scores.dtype), axis=-1
        )
        sure = (best[:, 0] - others.max(axis=-1)) >= shape.guard
    return accept(tree, chosen, shape.depth, sure)


def commit(
    fresh: list[tuple[mx.array, mx.array]],
    kept: mx.array,
    cut: int,
    path: mx.array,
    offset: mx.array,
    bases: list,
    keys: list[mx.array],
    values: list[mx.array],
) -> None:
    """Put the K/V of the accepted path where the tree began, in the buffers of ``keys``, ``values``.

    The rows come from the pass's own small arrays: a buffer that is read and written in one go
    would be copied whole.

    Args:
        fresh, kept: of ``Verified``.
        cut: the first MSA layer; lower layers hold all nodes of the tree, the others the kept ones.
        path: accepted nodes (of the kept ones), the root repeated behind their end, int32 [D + 1].
        offset: position of the root, int32 [].
    """
    lower = kept[path]
    stores = _stores(offset, bases, [0] * len(keys), keys, values)
    for layer, (store, (k, v)) in enumerate(zip(stores, fresh, strict=True)):
        rows = path if layer >= cut else lower
        store.write(k[:, :, rows], v[:, :, rows])
    _hand_over(stores, keys, values)


def stream_logits(
    seams: Seams,
    shape: PassShape,
    hidden: mx.array,
    root: mx.array,
    offset: mx.array,
    bases: list,
    keys: list[mx.array],
    values: list[mx.array],
    gamma: int | None = None,
) -> Said:
    """What the streams of the accepted node say.

    Inline they were part of the pass. Deferred they run alone through the MSA layers, an ordinary
    causal chunk behind the accepted node that leaves no K/V behind.

    Args:
        hidden: ``Verified.of_node`` of the accepted node.
        root: the token chosen there, int32 [].
        offset: position of the next root, one behind the accepted node, int32 [].
        gamma: only the first so many deferred streams; None: all.
    """
    if not shape.inline:
        stores = _stores(offset, bases, shape.lengths, keys, values)
        host = (offset - 1).reshape(1, 1)
        roots = root.reshape(1, 1)
        run = seams.run_streams(hidden, host, roots, stores, decoding=True, gamma=gamma)
        _hand_over(stores, keys, values)
        hidden = run.last_hidden
    if seams.streams.config.condition_rank:
        hidden = below_root(seams, hidden, root)
    return Said(seams.draft_head(hidden)[0], hidden)


def guesses_of(seams: Seams, said: Said, chooser, count: int, place: int) -> Guesses:
    """The ``count`` likeliest tokens of each stream for the places from ``place`` on."""
    logits, change, heat = said.logits, None, seams.streams.temperatures
    if heat is not None:
        heat = mx.array(heat)[: len(logits), None]  # [g, 1]
        logits = logits / heat
    if seams.streams.config.condition_rank:
        count = min(max(count, WIDE), logits.shape[-1])

        def change(tokens):
            more = change_below(seams, said.hidden, tokens)
            return more if heat is None else more / heat[..., None]

    return chooser.guesses(logits, count, place, seams.draft_vocabulary, change)


def _at_cut(run: Pass) -> mx.array:
    """M^{N-Ns}; without streams there is no cut, and nobody will look at it."""
    return run.last_hidden if run.cut_hidden is None else run.cut_hidden


def _stores(offset: mx.array, bases: list, lengths, keys: list, values: list) -> list[RowStore]:
    """One store per layer; layers with one base share the array that says where rows go."""
    at = {id(base): offset - base for base in bases}
    return [
        RowStore(k, v, at[id(base)], base, length)
        for k, v, base, length in zip(keys, values, bases, lengths, strict=True)
    ]


def _hand_over(stores: list[RowStore], keys: list, values: list) -> None:
    """Put the buffers back into ``keys``, ``values``.

    A pass and its contexts hold each other until Python collects them. Where nothing is compiled, a
    buffer that they still held would be copied whole by the next write.
    """
    keys[:], values[:] = [s.keys for s in stores], [s.values for s in stores]
    for store in stores:
        store.keys = store.values = None
