"""What passes cost on this machine, for this model: measured by ``tune``, or a cautious guess."""

from __future__ import annotations

import mlx.core as mx

from ..model.seams import Seams
from .costs import Costs, default_costs


def costs_for(seams: Seams) -> Costs:
    """The profile that ``mlx-specstream tune`` stored, or default costs."""
    config = seams.streams.config if seams.streams else None
    return default_costs(
        "gpu" if mx.default_device() == mx.gpu else "cpu",
        seams.num_layers,
        config.msa_layers if config else 1,
        streams=config.num_streams if config else 4,
    )
