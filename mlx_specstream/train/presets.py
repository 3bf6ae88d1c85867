"""Presets: settings that go together, and what follows from the model's size. A leaf.

Streams in four layers that are told their root (to look up what follows a token takes the layer where
the base itself does so), six of them, drafts conditioned by one map for all and LoRA of scale 1 at a
rate of 1e-3 are what worked best on the 14 M model of docs/log.md (8 layers of width 384). For other
sizes the rate is scaled by the usual rule for LoRA, not by a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEASURED_WIDTH, MEASURED_RATE = 384, 1e-3
MOST_LAYERS = 4  # what was measured to do in a model of 8; every one makes a pass dearer


@dataclass(frozen=True)
class Preset:
    """How much of everything.

    Args:
        iters: steps; num_streams: gamma; batch_size: sequences per batch.
        lora_rank, condition_rank, root_rank: of the LoRA, of the correction by the token before, which
            all streams share, and of what tells them their root.
        validations: how many there are in a run.
    """

    iters: int
    num_streams: int
    lora_rank: int
    condition_rank: int
    root_rank: int
    batch_size: int = 4
    validations: int = 15

    def __str__(self) -> str:
        return (
            f"{self.iters} steps of {self.batch_size} rows, {self.num_streams} streams, LoRA rank "
            f"{self.lora_rank}, condition rank {self.condition_rank}, root rank {self.root_rank}"
        )

    @property
    def eval_every(self) -> int:
        return every(self.iters, self.validations)


PRESETS = {
    "quick": Preset(400, 3, lora_rank=16, condition_rank=32, root_rank=16, validations=8),
    "default": Preset(3000, 4, lora_rank=16, condition_rank=64, root_rank=32),
    "best": Preset(10000, 6, lora_rank=16, condition_rank=128, root_rank=64, validations=25),
}
APART = 25  # steps from one validation to the next, at least: a validation takes as long as some
PRUNE_RANK = 8  # of an early-exit head that is trained alone


def every(iters: int, times: int) -> int:
    """Steps between validations, for about so many of them; a short run has fewer."""
    return max(min(iters, APART), iters // times)


def msa_layers(layers: int) -> int:
    """Ns for a model with so many layers: half of them, at most ``MOST_LAYERS``."""
    return max(1, min(MOST_LAYERS, layers // 2))


def learning_rate(width: int) -> float:
    """Peak rate of the LoRA for a hidden size: falls with its square root, never above the measured one."""
    rate = MEASURED_RATE * math.sqrt(min(1.0, MEASURED_WIDTH / width))
    return float(f"{rate:.2g}")


def explained() -> str:
    """What every preset means, for --help."""
    return "; ".join(f"{name}: {preset}" for name, preset in PRESETS.items())
