"""The weights of a converted model: files of at most 5 GB and their index, as mlx-lm lays them out."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .safetensors_writer import write_safetensors

Progress = Callable[[int, int], None]  # bytes written, bytes in all


def save_weights(folder: Path, model: nn.Module, progress: Progress) -> None:
    """Write a model's parameters, which it loses on the way: memory holds one tensor at a time.

    mlx-lm's `save_model` holds a whole file and says nothing until it is written.

    Raises: OSError (a full disk among them).
    """
    from mlx_lm.utils import get_total_parameters, make_shards

    weights = dict(tree_flatten(model.parameters()))
    total = sum(array.nbytes for array in weights.values())
    about = {"total_size": total, "total_parameters": get_total_parameters(model)}
    shards = make_shards(weights)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    table = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    weights.clear()
    done = 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "mlx"}, wrote)
    index = {"metadata": about, "weight_map": dict(sorted(table.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
