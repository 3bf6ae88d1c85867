"""verify: follow the main stream's own choices down the tree (sample-then-match).

Each token is chosen from the main stream at its place and never from the draft, so the output has
the main stream's law for any tree; the draft decides only how far one pass reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import mlx.core as mx

from .tree import HostTree, Tree


class Accepted(NamedTuple):
    """The outcome of a pass, on the device.

    Shapes: path int32 [D + 1]: accepted nodes from the root down, the root behind their end;
    count int32 []: how many of them are sure; report int32 [2 D + 4]: what the host reads: the
    number of accepted nodes, 1 if the last node's choice is a near-tie, the path, the token chosen
    at each node of the path.
    """

    path: mx.array
    count: mx.array
    report: mx.array


def accept(tree: Tree, chosen: mx.array, depth: int, sure: mx.array | None = None) -> Accepted:
    """The longest path on which every node holds the token chosen at its parent.

    Args:
        chosen: the main stream's token at each node, int32 [n].
        depth: D, the deepest node there can be.
        sure: nodes whose choice does not hang on rounding, bool [n]; None: all. A path ends at a
            node whose choice does, and the choice there is left to a pass of one row.
    """
    held = tree.tokens == chosen[tree.parents]
    if sure is not None:
        held = held & sure[tree.parents]
    held = held | (tree.depth == 0)
    whole = mx.logical_not((tree.ancestors & mx.logical_not(held)[None]).any(axis=-1))
    last = mx.argmax(mx.where(whole, tree.depth + 1, 0))
    on_path = tree.ancestors[last]
    level = mx.arange(depth + 1)[:, None]
    path = mx.argmax(on_path[None] & (tree.depth[None] == level), axis=-1).astype(mx.int32)
    count = tree.depth[last] + 1
    tie = mx.zeros_like(count) if sure is None else mx.logical_not(sure[last]).astype(mx.int32)
    report = mx.concatenate([mx.stack([count, tie]), path, chosen[path].astype(mx.int32)])
    return Accepted(path, count - tie, report)


def descend(
    tree: HostTree, choose: Callable[[int], int], *, limit: int, stop: Collection[int]
) -> tuple[list[int], list[int]]:
    """The same on the host, node by node, for choices that cannot be made in a batch.

    Args:
        choose: the main stream's token at a node; called once per node of the path, in order.
        limit: at most this many tokens (>= 1).
        stop: end-of-sequence tokens: nothing is chosen after one.

    Returns:
        The accepted nodes from the root down, and the token chosen at each.
    """
    path, tokens = [0], []
    while True:
        token = choose(path[-1])
        tokens.append(token)
        child = tree.child(path[-1], token)
        if child is None or len(tokens) == limit or token in stop:
            return path, tokens
        path.append(child)
