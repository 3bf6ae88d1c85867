"""Readers of whole folders, for the fuzzer: shards and their index, adapters of mlx-lm, rope, `inspect`."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import fuzz_inputs
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_specstream.converters.conversion import rotary_notes
from mlx_specstream.converters.formats import open_checkpoint
from mlx_specstream.converters.hf_config import normalise
from mlx_specstream.converters.inspection import inspect
from mlx_specstream.converters.mlx_adapter import fuse_adapter
from mlx_specstream.converters.plausible import check_layers
from mlx_specstream.converters.source import check_remote_code, read_config
from mlx_specstream.converters.staging import one_line
from mlx_specstream.converters.weights import check_unique
from mlx_specstream.errors import BadCheckpoint, SpecStreamError
from mlx_specstream.model.architectures import model_classes

CONFIG = {
    **{"model_type": "llama", "vocab_size": 7, "hidden_size": 8, "intermediate_size": 12},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1e4},
}
PARTS = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]


def built(config: dict):
    """mlx-lm's model of a config, refused as a conversion refuses it."""
    model_class, args_class = model_classes(config)
    try:
        return model_class(args_class.from_dict(config))
    except SpecStreamError:
        raise
    except Exception as error:  # as `load_staged` does: classes raise what they like
        raise BadCheckpoint(one_line(error)) from None


def read_model(path: Path) -> None:
    """config.json as far as the check of the rope."""
    config = read_config(path.parent)
    check_remote_code(config, False)
    new, _ = normalise(config)
    check_layers(new, 64)
    if "text_config" not in config:
        rotary_notes(built(new), config)


def tensors() -> dict[str, mx.array]:
    """Weights of a model whose config ties the head, which differs."""
    mx.random.seed(3)
    found = dict(tree_flatten(built(CONFIG).parameters()))
    found["lm_head.weight"] = found["model.embed_tokens.weight"] + 1
    return {name: value.astype(mx.bfloat16) for name, value in found.items()}


def make_model(folder: Path) -> list[bytes]:
    """A model in two shards. Returns: good inputs for `place`."""
    folder.mkdir()
    every = tensors()
    halves = dict(list(every.items())[::2]), dict(list(every.items())[1::2])
    table = {}
    for part, half in zip(PARTS, halves, strict=True):
        mx.save_safetensors(str(folder / part), half, {"format": "pt"})
        table |= dict.fromkeys(half, part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    changed = (PARTS[1], "config.json", index.name)
    return [(folder / name).read_bytes() for name in changed]


def place(folder: Path, data: bytes) -> tuple[Path, bytes]:
    """Which file an input replaces, told from how it looks; and what it holds otherwise."""
    if data[:1] == b"{":
        table = b"weight_map" in data
        name = "model.safetensors.index.json" if table else "config.json"
    else:
        name = PARTS[1]
    path = folder / name
    good = path.read_bytes()
    path.write_bytes(data)
    return path, good


def replaced(folder: Path, read: Callable[[Path], None], unwatched) -> Callable[[bytes], None]:
    """A reader of a folder in which an input replaces one good file."""

    def run(data: bytes) -> None:
        with unwatched():
            path, good = place(folder, data)
        try:
            read(folder)
        finally:
            with unwatched():
                path.write_bytes(good)

    return run


def read_shards(folder: Path) -> None:
    """Everything up to the files that mlx-lm's loader gets."""
    checkpoint = open_checkpoint(folder)
    check_remote_code(checkpoint.config, False)
    checkpoint.settle_head()
    normalise(checkpoint.config)
    names = {}
    for shard in checkpoint.shards(folder):
        names[shard.path] = shard.names
        if shard.tensors is not None:
            mx.eval(shard.tensors(False))
    check_unique(names)


def make_adapter(folder: Path) -> list[bytes]:
    """An adapter of mlx-lm for the model above. Returns: its settings and its weights."""
    folder.mkdir()
    layer, shapes = "model.layers.1.self_attn.q_proj", {"lora_a": (8, 3), "lora_b": (3, 8)}
    path = folder / "adapters.safetensors"
    mx.save_safetensors(str(path), {f"{layer}.{k}": mx.ones(v) for k, v in shapes.items()})
    parameters = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    about = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return [(folder / name).read_bytes() for name in ("adapter_config.json", path.name)]


def adapter_reader(folder: Path, unwatched) -> Callable[[bytes], None]:
    settings, weights = make_adapter(folder)

    def read(data: bytes) -> None:
        changed = data[:1] == b"{"
        with unwatched():
            (folder / "adapter_config.json").write_bytes(data if changed else settings)
            (folder / "adapters.safetensors").write_bytes(weights if changed else data)
        model = fuse_adapter(built(CONFIG), folder)
        mx.eval(model.parameters())

    return read


def inspector(folder: Path, room: Path, unwatched) -> Callable[[bytes], None]:
    """`inspect`, whose scratch folders lie in `room`."""
    room.mkdir()

    def read(folder: Path) -> None:
        before, tempfile.tempdir = tempfile.tempdir, str(room)
        try:
            report = inspect(folder)
        finally:
            tempfile.tempdir = before
        if report["safe"] != "yes":
            raise BadCheckpoint(report.problems[0])
        left = list(room.iterdir())
        if left:
            raise AssertionError(f"left behind: {left}")

    return replaced(folder, read, unwatched)


def folder_targets(folder: Path, unwatched) -> dict[str, tuple]:
    """name -> (reader, good inputs, share of all inputs, imports, where it may write)."""
    config = folder / "rope"
    config.mkdir()

    def rope(data: bytes) -> None:
        with unwatched():
            (config / "config.json").write_bytes(data)
        read_model(config / "config.json")

    shards, whole, room = folder / "shards", folder / "whole", folder / "room"
    seeds = make_model(shards)
    make_model(whole)
    adapter = adapter_reader(folder / "fuse", unwatched)
    return {
        "rope": (rope, fuzz_inputs.config_seeds(), 0.01, True),
        "shards": (replaced(shards, read_shards, unwatched), seeds, 0.02, True),
        "fuse": (adapter, make_adapter(folder / "seeds"), 0.01, True),
        "inspect": (inspector(whole, room, unwatched), seeds, 0.01, True, room),
    }
