"""plan: which tree to draft and where the streams run."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..config import StreamConfig
from ..errors import BadArgument
from .prune import PruneRule
from .tree import MAX_NODES, TreeShape

PLACEMENTS = ("inline", "deferred")
# Nodes of the default tree. CPU: the knee measured with OpenBLAS on two cores (docs/log.md). GPU: up to
# about five rows of a pass are cheap on Apple chips in others' reports; not measured by us.
GPU_NODES, CPU_NODES = 5, 8


@dataclass(frozen=True)
class Plan:
    """How a step drafts and verifies.

    Args:
        tree: shape of the draft.
        placement: ``"inline"`` (streams ride along with every kept node, as in the paper) or
            ``"deferred"`` (after verification the accepted node's streams run alone).
        prune: early-exit pruning before the MSA layers, or None.
    """

    tree: TreeShape
    placement: str
    prune: PruneRule | None = None


def make_plan(
    config: StreamConfig,
    tree: str | None = None,
    placement: str | None = None,
    prune: PruneRule | None = None,
) -> Plan:
    """The plan a caller asked for, the rest chosen for this device.

    Raises:
        BadArgument: an unknown tree or placement, or one that these streams cannot do.
    """
    if tree is None:
        gpu = mx.default_device() == mx.gpu
        tree = f"best:{GPU_NODES if gpu else CPU_NODES}"
    if placement is None:
        placement = "inline" if config.main_sees_streams else "deferred"
    if placement not in PLACEMENTS:
        raise BadArgument(f"[placement] must be one of {', '.join(PLACEMENTS)}; got '{placement}'.")
    if config.main_sees_streams and placement == "deferred":
        raise BadArgument(
            "[placement] 'deferred' needs streams that the main stream does not see; these were "
            "trained with main_sees_streams, use 'inline'."
        )
    if prune is not None and not config.prune_rank:
        raise BadArgument(
            "[prune] these streams have no early-exit head (prune_rank 0); train them with "
            "--prune-rank 8 or do not prune."
        )
    shape = TreeShape.parse(tree)
    nodes = shape.nodes(config.num_streams)
    if nodes > MAX_NODES:
        raise BadArgument(
            f"[tree] '{tree}' has {nodes} nodes with {config.num_streams} streams, more than "
            f"{MAX_NODES}; use a smaller one."
        )
    return Plan(shape, placement, prune)
