"""prune: the early exit at the cut tells which nodes are worth the MSA layers (method 1.6)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import BadArgument
from .tree import Tree


@dataclass(frozen=True)
class PruneRule:
    """Which nodes stay. Exactly one of the two is set.

    Args:
        keep: this many nodes, the most probable by product along the path (fixed shapes).
        threshold: a sub-tree goes when P(child | parent) of its top node is below this (0..1).
            How many stay depends on the text, so such passes wait for the host and are not
            compiled.
    """

    keep: int | None = None
    threshold: float | None = None

    def __post_init__(self):
        if (self.keep is None) == (self.threshold is None):
            raise BadArgument("[prune] set either 'keep' or 'threshold'.")
        if self.keep is not None and self.keep < 1:
            raise BadArgument(f"[prune] 'keep' must be >= 1, got {self.keep}.")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise BadArgument(f"[prune] 'threshold' must lie in 0..1, got {self.threshold}.")


def edge_logprobs(tree: Tree, logits: mx.array) -> mx.array:
    """log P(node | parent) by the early exit; logits [n, V] at the cut -> float32 [n] (root: 0)."""
    logits = logits.astype(mx.float32)
    norm = mx.logsumexp(logits, axis=-1)
    scores = logits[tree.parents, tree.tokens] - norm[tree.parents]
    return mx.where(tree.depth == 0, 0.0, scores)


def nodes_to_keep(tree: Tree, logprobs: mx.array, rule: PruneRule) -> mx.array:
    """Indices of the nodes that stay, int32 [m] ascending; with a node its parent, always the root."""
    along = mx.where(tree.ancestors, logprobs[None], 0.0)
    if rule.threshold is not None:
        with np.errstate(divide="ignore"):
            stays = np.array(along.min(axis=1)) >= np.log(rule.threshold)
        return mx.array(np.flatnonzero(stays).astype(np.int32))
    # A path's probability never grows with depth, and equal ones keep the parent first.
    order = mx.argsort(mx.arange(tree.size) * 1e-5 - mx.maximum(along.sum(axis=1), -100.0))
    return mx.sort(order[: rule.keep]).astype(mx.int32)
