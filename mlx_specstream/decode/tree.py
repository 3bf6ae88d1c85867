"""Token trees: the candidate continuations that one pass verifies. Plain NumPy, no model."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Tree:
    """Nodes in an order in which parents come first; node 0 is the root, the last known token.

    Shapes: tokens int32 [n]; parents int32 [n] (-1 for the root); depth int32 [n].
    """

    tokens: np.ndarray
    parents: np.ndarray
    depth: np.ndarray

    @property
    def size(self) -> int:
        return len(self.tokens)

    @cached_property
    def ancestors(self) -> np.ndarray:
        """ancestors[i, k]: k is i or an ancestor of i, bool [n, n]."""
        seen = np.eye(self.size, dtype=bool)
        for node in range(1, self.size):
            seen[node] |= seen[self.parents[node]]
        return seen

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return {(int(self.parents[i]), int(self.tokens[i])): i for i in range(1, self.size)}

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that holds ``token``."""
        return self._children.get((node, token))

    def take(self, keep: np.ndarray) -> Tree:
        """The sub-tree of the nodes in ``keep`` (ascending; with every node its parent)."""
        new = np.full(self.size + 1, -1)  # the extra place maps parent -1 to -1
        new[keep] = np.arange(len(keep))
        return Tree(self.tokens[keep], new[self.parents[keep]].astype(np.int32), self.depth[keep])


def root_only(token: int) -> Tree:
    return Tree(np.array([token], np.int32), np.array([-1], np.int32), np.array([0], np.int32))


def cartesian_tree(root: int, tokens: np.ndarray) -> Tree:
    """Every depth-d node has the same children: row d of ``tokens`` [depth, K] (method 1.4)."""
    out, parents, depth = [root], [-1], [0]
    level = [0]
    for d, row in enumerate(tokens, 1):
        below = []
        for parent in level:
            for token in row:
                below.append(len(out))
                out.append(int(token))
                parents.append(parent)
                depth.append(d)
        level = below
    return _tree(out, parents, depth)


def best_first_tree(root: int, tokens: np.ndarray, logprobs: np.ndarray, nodes: int) -> Tree:
    """The ``nodes`` most probable nodes by product of probabilities along the path.

    Args:
        tokens, logprobs: candidates of each depth, most probable first, [depth, K].
    """
    out, parents, depth = [root], [-1], [0]
    deepest, K = tokens.shape
    heap: list[tuple[float, int, int, int, float]] = []  # (-score, tie, parent, rank, parent score)

    def offer(parent: int, rank: int, above: float) -> None:
        d = depth[parent]
        if d < deepest and rank < K:
            score = above + float(logprobs[d, rank])
            heapq.heappush(heap, (-score, len(out) * K + rank, parent, rank, above))

    offer(0, 0, 0.0)
    while heap and len(out) < nodes:
        score, _, parent, rank, above = heapq.heappop(heap)
        node = len(out)
        out.append(int(tokens[depth[parent], rank]))
        parents.append(parent)
        depth.append(depth[parent] + 1)
        offer(node, 0, -score)
        offer(parent, rank + 1, above)
    return _tree(out, parents, depth)


def _tree(tokens, parents, depth) -> Tree:
    return Tree(*(np.array(x, np.int32) for x in (tokens, parents, depth)))
