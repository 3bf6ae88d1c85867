"""What a run trains, as one module."""

from __future__ import annotations

import mlx.nn as nn

from ..model.seams import Seams
from ..model.streams import Streams


class Learner(nn.Module):
    """Everything that a run trains: the streams and, in shared mode, the LoRA of the model.

    Args:
        only: ``"pruning"``: the early-exit head of the streams and nothing else.
    """

    def __init__(self, streams: Streams, main_lora: list[nn.Module], only: str | None = None):
        super().__init__()
        self.streams = streams
        streams.unfreeze()  # an earlier run may have trained a part
        if only == "pruning":
            streams.freeze()
            streams.early_exit.unfreeze()
        if main_lora:
            self.lora = main_lora

    @property
    def main_lora(self) -> list[nn.Module]:
        return self.get("lora", [])

    def reach(self, seams: Seams) -> int:
        """How many layers, from the top, hold something trained (or have streams run through)."""
        mine = {id(module) for module in self.main_lora}
        for index, layer in enumerate(seams.model.layers):
            if index >= seams.cut or any(id(m) in mine for _, m in layer.named_modules()):
                return seams.num_layers - index
        return 0
