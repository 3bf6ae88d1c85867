"""The way back: a model folder of mlx-lm to Hugging Face's form, streams to PyTorch's.

mlx-lm's classes rename and stack tensors when they load a Hugging Face checkpoint (`sanitize`). Here
that is undone, and `sanitize` itself is the judge: what is written must give back the same bits.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_specstream.errors import BadArgument, UnsupportedModel
from mlx_specstream.model.architectures import model_classes
from mlx_specstream.model.checkpoint import DESCRIPTION, find_streams
from mlx_specstream.model.support import TESTED

from .families import parts_of
from .folder import check_folder
from .new_folder import check_free, new_folder
from .precision import requantize
from .safetensors_header import check_safetensors
from .safetensors_writer import raw, write_safetensors
from .source import check_remote_code, copy_files, find_source, read_config
from .staging import load_staged
from .torch_streams import FILE, read_streams_folder, write_torch_streams

Weights = dict[str, mx.array]


def export(
    path: str,
    out: str,
    *,
    dequantize: bool = False,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Write a model folder in Hugging Face's form, or streams in PyTorch's.

    Args:
        path: a model folder in mlx-lm's layout (its streams come along), or a streams folder.
        out: the new folder, which must not exist yet. A model becomes `model*.safetensors` and
            config.json as transformers reads them, streams `pytorch_streams.safetensors`.
        dequantize: write full weights of a quantised model.
        log: takes progress lines.

    Returns: the new folder. It appears at the end, whole, or not at all.
    Raises: BadArgument, BadCheckpoint or UnsupportedModel, each with one line.
    """
    log = log or (lambda line: None)
    target = Path(out).expanduser()
    check_free(target)
    source = find_source(path)
    check_folder(source)
    alone = (source / DESCRIPTION).is_file() and not (source / "config.json").is_file()
    with new_folder(target) as folder:
        streams = source if alone else find_streams(source)
        if not alone:
            export_model(source, folder, dequantize, log)
        if streams is not None:
            write_torch_streams(read_streams_folder(streams), folder / FILE)
            log(f"streams: {FILE}")
    log(f"wrote {target}")
    return target


def export_model(source: Path, folder: Path, dequantize: bool, log) -> None:
    from mlx_lm.utils import make_shards

    original = read_config(source)
    check_remote_code(original, False)
    for file in source.glob("model*.safetensors"):
        check_safetensors(file)
    family = original["model_type"]
    if family not in TESTED:
        log(
            f"note: nobody has held the way back of {family!r} against transformers yet; compare logits"
        )
    back, config = turned_back(source, dequantize)
    packed = sorted(name for name in back if name.endswith(".scales"))
    if packed:
        raise BadArgument(
            f"{source}: {packed[0].removesuffix('.scales')} is quantised, which Hugging Face's form "
            "cannot hold; add --dequantize"
        )
    check_gives_back(weights_of(source, dequantize)[0], back, config)
    back, _ = turned_back(source, dequantize)  # lazy again: what was compared is let go
    written = transformers_config(config, back)
    shards = make_shards(back)
    table, total = {}, sum(value.nbytes for value in back.values())
    back.clear()
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        table |= dict.fromkeys(shard, name)
        log(f"writing {name}")
        write_safetensors(folder / name, shard, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    if len(shards) > 1:
        text = json.dumps(index, indent=1) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    text = json.dumps(written, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    copy_files(source, folder)


def weights_of(source: Path, dequantize: bool) -> tuple[Weights, dict]:
    """The parameters of a model folder, lazy, and its config."""
    model, config = load_staged(source, False)
    model, config = requantize(model, config, False, dequantize, None, lambda line: None)
    return dict(tree_flatten(model.parameters())), config


def turned_back(source: Path, dequantize: bool) -> tuple[Weights, dict]:
    """As `weights_of`, under the names and in the shapes of transformers."""
    weights, config = weights_of(source, dequantize)
    undo = UNDO.get(config["model_type"], lambda weights: weights)
    return turned_convolutions(undo(weights)), config


def transformers_config(config: dict, hf: Weights) -> dict:
    """config.json without what only mlx-lm reads; packed experts say what they are."""
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    if any(name.endswith("_blocks") for name in hf):
        config["quantization_config"] = {"quant_method": "mxfp4"}
    return dict(sorted(config.items()))


def check_gives_back(wanted: Weights, hf: Weights, config: dict) -> None:
    """Raise UnsupportedModel unless mlx-lm's class makes the very same weights of `hf`.

    Both are emptied on the way, so that memory holds a few tensors and not two models.
    """
    again, family = dict(hf), config["model_type"]
    hf.clear()
    again = {part.name: part.of(v) for k, v in again.items() for part in parts_of(k, config)}
    try:
        model_class, args_class = model_classes(config)
        fresh = model_class(args_class.from_dict(config))  # some change themselves as they load
        again = fresh.sanitize(again) if hasattr(fresh, "sanitize") else again
    except Exception as error:  # whatever a class does with names that it does not expect
        raise UnsupportedModel(
            f"model_type {family!r} has no way back: {type(error).__name__}: {error}"
        ) from None
    for name in sorted(wanted.keys() | again.keys()):
        mine, got = wanted.pop(name, None), again.pop(name, None)
        same = mine is not None and got is not None and mine.shape == got.shape
        if not (same and mine.dtype == got.dtype and raw(mine) == raw(got)):
            raise UnsupportedModel(
                f"model_type {family!r} has no way back: its tensors are changed when mlx-lm loads "
                f"them ({name!r}), and how is not known here"
            )
        del mine, got
        mx.clear_cache()


def turned_convolutions(weights: Weights) -> Weights:
    """Recurrent layers: [channels, taps, 1] of MLX is [channels, 1, taps] of PyTorch.

    `sanitize` takes both, so it would not notice.
    """
    return {
        name: value.moveaxis(1, 2) if name.endswith("conv1d.weight") else value
        for name, value in weights.items()
    }


def transposed(weights: Weights) -> Weights:
    """gpt2: no prefix, and [d_in, d_out] matrices in the layers."""
    matrix = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
    named = {name.removeprefix("model."): value for name, value in weights.items()}
    return {name: value.T if matrix.fullmatch(name) else value for name, value in named.items()}


def unstacked(owner: str, names: dict[str, str]) -> Callable[[Weights], Weights]:
    """One tensor per expert again: {owner}.switch_mlp.{ours} -> {owner}.experts.{e}.{theirs}."""

    def undo(weights: Weights) -> Weights:
        found = {}
        for name, value in weights.items():
            head, mark, tail = name.partition(f"{owner}.switch_mlp.")
            if not mark:
                found[name] = value
                continue
            part, _, leaf = tail.partition(".")
            for expert in range(value.shape[0]):
                found[f"{head}{owner}.experts.{expert}.{names[part]}.{leaf}"] = value[expert]
        return found

    return undo


def packed_experts(weights: Weights) -> Weights:
    """gpt_oss: gate and up rows take turns in one tensor; MXFP4 as bytes in blocks of 32 weights."""
    found = {}
    for name, value in weights.items():
        head, mark, tail = name.partition(".experts.")
        part, _, leaf = tail.partition(".")
        if not mark or part == "up_proj":
            found |= {} if mark else {name: value}
            continue
        if part == "gate_proj":
            part, up = "gate_up_proj", weights[f"{head}.experts.up_proj.{leaf}"]
            axis = 1  # rows of each expert, or entries of its bias
            value = mx.stack([value, up], axis=axis + 1).reshape(
                value.shape[0], -1, *value.shape[2:]
            )
        suffix = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}[leaf]
        if leaf == "weight" and value.dtype == mx.uint32:
            blocks = value.view(mx.uint8)
            value = blocks.reshape(*blocks.shape[:-1], -1, 16)
        elif leaf == "weight":  # not packed: columns first
            value, suffix = mx.swapaxes(value, -1, -2), ""
        found[f"{head}.experts.{part}{suffix}"] = value
    return found


PROJECTIONS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
UNDO = {
    "gpt2": transposed,
    "gpt_oss": packed_experts,
    "mixtral": unstacked(
        "block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    ),
    "qwen2_moe": unstacked("mlp", PROJECTIONS),
    "qwen3_moe": unstacked("mlp", PROJECTIONS),
    "olmoe": unstacked("mlp", PROJECTIONS),
}
