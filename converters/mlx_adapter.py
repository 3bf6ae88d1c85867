"""mlx-lm's adapters: made of PEFT's (kept apart from the base), and fused into a base."""

import json
import math
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_specstream.errors import BadCheckpoint, UnsupportedModel

from .peft_adapter import CONFIG, PeftAdapter, Update
from .safetensors_header import check_safetensors
from .safetensors_writer import write_safetensors
from .weights import read_json

WEIGHTS = "adapters.safetensors"
HALVES = (".lora_a", ".lora_b")
LAYERS = ("layers", "h")  # what mlx-lm's models call their list of layers
MLX_PREFIX = {"gpt2": "model."}  # mlx-lm's name of what the files of a family leave out


def is_mlx_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def fuse_adapter(model, folder: Path, dequantize: bool = False):
    """Put an adapter of mlx-lm (LoRA, DoRA or full) into a model's weights, as `mlx_lm.fuse` does.

    Args:
        dequantize: leave the layers of a quantised base as they are then, not rounded again.

    Raises: BadCheckpoint when it is damaged or belongs to another base.
    """
    from mlx_lm.utils import load_adapters

    kind = read_json(folder / CONFIG).get("fine_tune_type")
    names = check_safetensors(folder / WEIGHTS)
    try:
        # mlx-lm holds what the file has against the model, and begins all else anew, of any size.
        if not any(kind == "full" or name.endswith(HALVES) for name in names):
            raise ValueError("it holds no update")
        model = load_adapters(model, str(folder))
        layers = [(name, m) for name, m in model.named_modules() if hasattr(m, "fuse")]
        if not all(math.isfinite(getattr(m, "scale", 1.0)) for _, m in layers):
            raise ValueError("'scale' is not finite")
        fused = [(name, m.fuse(dequantize=dequantize)) for name, m in layers]
    except Exception as error:  # missing keys, other shapes, whatever mlx-lm meets
        line = " ".join(str(error).split())
        raise BadCheckpoint(f"{folder}: the adapter does not fit the base: {line[:300]}") from None
    model.update_modules(tree_unflatten(fused))
    model.eval()
    return model


def write_mlx_adapter(adapter: PeftAdapter, target: Path, family: str | None) -> None:
    """A folder that `mlx_lm.load(model, adapter_path=...)` takes, without the base.

    mlx-lm has one rank and one scale for all modules: smaller ranks are filled up with zeros, and
    the scales go into B.

    Raises: UnsupportedModel for what mlx-lm's adapters cannot say.
    """
    if adapter.replaced:
        raise UnsupportedModel(
            f"{adapter.folder}: the adapter replaces {sorted(adapter.replaced)[0]!r}, which mlx-lm's "
            "adapters cannot; merge it into its base with --adapter"
        )
    dora = {update.magnitude is not None for update in adapter.updates.values()}
    biased = [name for name, update in adapter.updates.items() if update.bias is not None]
    experts = [name for name in adapter.updates if ".experts." in name]
    if len(dora) > 1 or biased or experts or (True in dora and embeddings(adapter)):
        what = (biased or experts or embeddings(adapter) or sorted(adapter.updates))[0]
        raise UnsupportedModel(
            f"{adapter.folder}: mlx-lm's adapters cannot hold the update of {what!r} (a bias of B, "
            "single experts, DoRA of embeddings or of some modules); merge it with --adapter"
        )
    rank = max(update.rank for update in adapter.updates.values())
    tensors, keys = {}, set()
    for name, update in adapter.updates.items():
        name = MLX_PREFIX.get(family, "") + name
        keys.add(key_of(name))
        a, b = filled(update, rank)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
        if update.magnitude is not None:
            tensors[f"{name}.m"] = update.magnitude.astype(mx.float32).reshape(-1)
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    kind = "dora" if True in dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    (target / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_safetensors(target / WEIGHTS, tensors, {"format": "mlx"})


def embeddings(adapter: PeftAdapter) -> list[str]:
    return [name for name, update in adapter.updates.items() if update.embedding]


def key_of(name: str) -> str:
    """A module's name inside its layer, as mlx-lm's `keys` spell it; whole outside the layers."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part in LAYERS and parts[at + 1].isdigit():
            return ".".join(parts[at + 2 :])
    return name


def filled(update: Update, rank: int) -> tuple[mx.array, mx.array]:
    """lora_a [d_in, rank] and lora_b [rank, d_out] of an update, its scale in B.

    mlx-lm's embedding has a [tokens, rank] and b [rank, width]: the same with PEFT's names.
    """
    a = update.a.astype(mx.float32).T
    b = (update.b.astype(mx.float32) * update.scale).T
    more = rank - update.rank
    if more:
        a, b = mx.pad(a, [(0, 0), (0, more)]), mx.pad(b, [(0, more), (0, 0)])
    return mx.contiguous(a), mx.contiguous(b)
