"""Token trees: the candidate continuations that one pass verifies, and the shapes they may have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import BadArgument

MAX_NODES = 4096


@dataclass(frozen=True)
class TreeShape:
    """How a tree is drafted.

    Args:
        kind: ``"chain"`` (the top token of each stream), ``"cartesian"`` (the top ``size`` tokens
            of each stream below every node of the depth before, method 1.4) or ``"best"`` (the
            ``size`` most probable nodes, root included, by product of stream probabilities).
        size: K of a Cartesian tree, the number of nodes of a best-first tree; ignored for chains.
    """

    kind: str
    size: int = 1

    def __post_init__(self):
        if self.kind not in ("chain", "cartesian", "best") or not 1 <= self.size <= MAX_NODES:
            raise BadArgument(
                f"[tree] a tree is 'chain', 'cartesian:K' or 'best:M' with 1 <= K, M <= "
                f"{MAX_NODES}; got '{self}'."
            )

    def __str__(self) -> str:
        return self.kind if self.kind == "chain" else f"{self.kind}:{self.size}"

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """``"chain"``, ``"cartesian:K"`` or ``"best:M"``; raises BadArgument."""
        kind, colon, size = str(text).partition(":")
        whole = size.isascii() and size.isdigit()
        if (kind == "chain") == bool(colon) or (colon and not whole):
            raise BadArgument(
                f"[tree] a tree is 'chain', 'cartesian:K' or 'best:M' with whole numbers K, M >= 1;"
                f" got '{text}'."
            )
        return cls(kind, int(size or 1))

    def nodes(self, depth: int) -> int:
        """The most nodes that a tree of this shape and depth has, root included."""
        if self.kind == "best":
            return self.size
        return sum(self.size**d for d in range(depth + 1))

    def candidates(self, vocabulary: int) -> int:
        """How many top tokens per stream a draft of this shape can use."""
        most = {"chain": 1, "cartesian": self.size, "best": max(1, self.size - 1)}[self.kind]
        return min(most, vocabulary)

    def ranks(self, depth: int, candidates: int) -> np.ndarray:
        """Every node that a tree of this shape may hold, as ranks of its tokens, int32 [S, depth].

        Row 0 is the root; a node of depth d names one rank for each of its first d columns, -1
        behind them. Parents come before children and a lower rank before a higher one.
        """
        return _ranks(self, depth, self.candidates(candidates))


@cache
def _ranks(shape: TreeShape, depth: int, candidates: int) -> np.ndarray:
    found: list[tuple[int, ...]] = [()]
    most = shape.size - 1 if shape.kind == "best" else MAX_NODES

    def extend(path: tuple[int, ...], above: int, before: int) -> None:
        # A best-first tree holds a node only with all nodes that are at least as probable whatever
        # the probabilities: `before` of them up to this depth, `above` at this depth alone.
        if len(path) == depth:
            return
        for rank in range(candidates):
            level = above * (rank + 1)
            if shape.kind == "best" and before + level > most:
                break
            found.append((*path, rank))
            extend(found[-1], level, before + level)

    extend((), 1, 0)
    rows = np.full((len(found), depth), -1, np.int32)
    for row, path in zip(rows, found, strict=True):
        row[: len(path)] = path
    return rows


class Tree(NamedTuple):
    """A token tree on the device; node 0 is the root, the last known token.

    Shapes: tokens, parents (the root's is itself), depth: int32 [n]; ancestors[i, k]: k is i or an
    ancestor of i, bool [n, n]; copied: the node was copied from the text, bool [n].
    """

    tokens: mx.array
    parents: mx.array
    depth: mx.array
    ancestors: mx.array
    copied: mx.array

    @property
    def size(self) -> int:
        return self.tokens.shape[0]

    def take(self, keep: mx.array) -> Tree:
        """The sub-tree of the nodes in ``keep`` (int32 [m], ascending; with every node its parent)."""
        place = mx.zeros((self.size,), mx.int32)
        place = mx.put_along_axis(place, keep, mx.arange(keep.size, dtype=mx.int32), axis=0)
        return Tree(
            self.tokens[keep],
            place[self.parents[keep]],
            self.depth[keep],
            self.ancestors[keep][:, keep],
            self.copied[keep],
        )


@dataclass(frozen=True)
class HostTree:
    """The same on the host, for samplers that are opaque functions. int32 [n] each."""

    tokens: np.ndarray
    parents: np.ndarray

    @classmethod
    def of(cls, tree: Tree) -> HostTree:
        return cls(np.array(tree.tokens), np.array(tree.parents))

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        nodes = range(1, len(self.tokens))
        return {(int(self.parents[i]), int(self.tokens[i])): i for i in reversed(nodes)}

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that holds ``token``."""
        return self._children.get((node, token))
