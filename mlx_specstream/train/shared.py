"""Shared mode: one LoRA for main stream and streams, which becomes part of the model (method 1.8).

The LoRA is mlx-lm's own, in the stock modules, so streams and main rows go through the same weights.
At the end it is fused: an ordinary mlx-lm model, and streams that need nothing but their embeddings.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model, save

from ..errors import BadArgument, BadCheckpoint
from ..model.projections import projections_of
from ..model.seams import detach
from .config import FineTune


@dataclass(frozen=True)
class Destination:
    """Where a fused model goes.

    Args:
        path: folder to write, in mlx-lm's layout.
        source: folder of the base.
        config: the base's config.json.
        dequantize: write a quantised base dequantised, so that nothing of what was learned is rounded
            off; else it is quantised again, as mlx-lm does.
    """

    path: Path
    source: Path
    config: dict[str, Any]
    dequantize: bool = False

    def __post_init__(self):
        if self.path.resolve() == self.source.resolve():
            raise BadArgument(
                f"[train] 'fused_path' must not be the base itself, got {self.path}; name another."
            )
        folder = next(p for p in self.path.absolute().parents if p.exists())  # where it is staged
        other = self.path.exists() and not self.path.is_dir()
        if other or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise BadArgument(f"[train] 'fused_path' {self.path} cannot be written; name another.")


def add_lora(model: nn.Module, fine_tune: FineTune, msa_layers: int) -> list[nn.Module]:
    """Put fresh LoRA into ``model``, freeze all else; returns the modules that have it.

    LoRA that is there already is fused first.

    Raises:
        BadArgument: the MSA layers are not among the layers, or no projection is a target.
    """
    number = len(model.layers) if fine_tune.num_layers == -1 else fine_tune.num_layers
    number = min(number, len(model.layers))
    if number < msa_layers:
        raise BadArgument(
            f"[train] 'num_layers' must be at least the {msa_layers} MSA layers, got {number}."
        )
    fuse(model)
    model.freeze()
    keys = set()
    for layer in model.layers[-number:]:
        paths = {id(module): path for path, module in layer.named_modules()}
        keys |= {
            paths[id(module)]
            for module, projection in projections_of(layer, 0)
            if set(projection.names) & set(fine_tune.targets)
        }
    if not keys:
        raise BadArgument(
            f"[train] none of {', '.join(fine_tune.targets)} is a projection of this model; choose "
            "other --lora-targets."
        )
    scale = fine_tune.alpha / fine_tune.rank
    settings = {"rank": fine_tune.rank, "scale": scale, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, number, settings)
    return [m for _, m in sorted(model.named_modules(), key=lambda x: x[0]) if "lora_a" in m]


def fuse(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Make LoRA layers part of the weights, as ``mlx_lm fuse`` does; takes the seams out."""
    detach(model)
    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    ]
    if fused:
        model.update_modules(tree_unflatten(fused))
    if dequantize:
        model = dequantize_model(model)
    model.unfreeze()
    mx.eval(model.parameters())
    return model


def save_fused(model: nn.Module, tokenizer, to: Destination) -> None:
    """Write ``model`` to ``to.path``. Until it is whole, what was there stays.

    Raises:
        BadCheckpoint: it cannot be written (a full disk).
    """
    config = dict(to.config)
    if to.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    to.path.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{to.path.name}-", dir=to.path.parent))
    try:
        save(stage, to.source, model, tokenizer, config, donate_model=False)
        stage.chmod(0o755)  # mkdtemp makes private folders
        _put(stage, to.path)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise BadCheckpoint(
            f"[save] {to.path} cannot be written ({line}); is the disk full?"
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put(stage: Path, target: Path) -> None:
    if not target.exists():
        stage.rename(target)
        return
    new = sorted(p.name for p in stage.iterdir())
    for name in new:
        os.replace(stage / name, target / name)
    for old in target.glob("model*.safetensors"):  # mlx-lm would read them, too
        if old.name not in new:
            old.unlink()
