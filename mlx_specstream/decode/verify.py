"""verify: follow the main stream's own choices down the tree (sample-then-match)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .tree import Tree


@dataclass(frozen=True)
class Accepted:
    """The outcome of a pass.

    Args:
        path: accepted nodes from the root down; their K/V stay.
        tokens: the tokens the main stream chose at them; the last one is the new root.
    """

    path: list[int]
    tokens: list[int]


def accept(
    tree: Tree, choose: Callable[[int], int], *, limit: int, stop: Collection[int]
) -> Accepted:
    """Descend from the root while the token chosen at a node is one of its children.

    Each token is drawn from the main stream at its place and never from the draft, so the output
    has the main stream's law for any tree; the draft decides only how far one pass reaches.

    Args:
        choose: the main stream's token at a node; called once per node of the path, in order.
        limit: at most this many tokens (>= 1).
        stop: end-of-sequence tokens: nothing is chosen after one.
    """
    path, tokens = [0], []
    while True:
        token = choose(path[-1])
        tokens.append(token)
        child = tree.child(path[-1], token)
        if child is None or len(tokens) == limit or token in stop:
            return Accepted(path, tokens)
        path.append(child)
