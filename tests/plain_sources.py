"""Checkpoints in every format that users come with, written byte by byte, without PyTorch."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import test_convert_pickle as pickles

KINDS = {mx.float32: "FloatStorage", mx.bfloat16: "BFloat16Storage", mx.float16: "HalfStorage"}
Tensors = dict[str, mx.array]


def bits(value: mx.array) -> np.ndarray:
    """The numbers of an array for a file; bfloat16 as the bits that it is."""
    whole = mx.contiguous(value)
    return np.array(whole.view(mx.uint16) if value.dtype == mx.bfloat16 else whole)


def state(tensors: Tensors) -> bytes:
    """The pickle of a state dict: storage i is tensor i."""
    entries = {}
    for key, (name, value) in enumerate(tensors.items()):
        where = pickles.storage(KINDS[value.dtype], str(key), value.size)
        strides = np.cumprod((1, *value.shape[:0:-1]))[::-1].tolist()
        entries[name] = pickles.tensor(where, 0, value.shape, tuple(strides))
    return pickles.state(entries)


def write_zip(path: Path, tensors: Tensors, wrap: Callable[[bytes], bytes] = lambda x: x) -> Path:
    storages = {str(i): bits(value).tobytes() for i, value in enumerate(tensors.values())}
    return pickles.write_zip(path, wrap(state(tensors)), storages)


def legacy(path: Path, tensors: Tensors) -> Path:
    """As PyTorch wrote before 1.6; its storages say no view."""
    data = state(tensors)
    storages = {str(i): bits(value) for i, value in enumerate(tensors.values())}
    return pickles.write_legacy(path, data, storages)


def training(data: bytes) -> bytes:
    """{"model": the state dict, "optimizer": ..., "epoch": 3}"""
    beside = {"optimizer": pickles.ops({"lr": 0.1}), "epoch": pickles.ops(3)}
    return pickles.state({"model": data[2:-1], **beside})


def parts(tensors: Tensors, count: int) -> list[Tensors]:
    names = list(tensors)
    return [{n: tensors[n] for n in names[i::count]} for i in range(count)]


def safetensors(folder: Path, tensors: Tensors) -> Path:
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def sharded(folder: Path, tensors: Tensors) -> Path:
    table = {}
    for i, part in enumerate(parts(tensors, 3), 1):
        name = f"model-{i:05d}-of-00003.safetensors"
        mx.save_safetensors(str(folder / name), part, {"format": "pt"})
        table |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def pickled(folder: Path, tensors: Tensors) -> Path:
    write_zip(folder / "pytorch_model.bin", tensors)
    return folder


def old_pickled(folder: Path, tensors: Tensors) -> Path:
    legacy(folder / "pytorch_model.bin", tensors)
    return folder


def pickled_shards(folder: Path, tensors: Tensors) -> Path:
    table = {}
    for i, part in enumerate(parts(tensors, 2), 1):
        name = f"pytorch_model-{i:05d}-of-00002.bin"
        (legacy if i == 2 else write_zip)(folder / name, part)
        table |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def bare(folder: Path, tensors: Tensors) -> Path:
    return write_zip(folder / "final.pth", tensors)


def nested(folder: Path, tensors: Tensors) -> Path:
    """Behind DataParallel, with an optimizer and a counter."""
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    return write_zip(folder / "last.pt", wrapped, training)


def lightning(folder: Path, tensors: Tensors) -> Path:
    wrapped = {f"model._orig_mod.{name}": value for name, value in tensors.items()}
    wrap = lambda data: pickles.state({"state_dict": data[2:-1]})  # noqa: E731
    return write_zip(folder / "last.ckpt", wrapped, wrap)


def meta(count: int) -> Callable[[Path, Tensors], Path]:
    def write(folder: Path, tensors: Tensors) -> Path:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        for i in range(count):
            part = {}
            for name, value in tensors.items():
                new, axis = meta_name(name)
                if new.endswith(("wq.weight", "wk.weight")):
                    value = neighbours(value, config)
                part[new] = value if axis is None else mx.split(value, count, axis=axis)[i]
            write_zip(folder / f"consolidated.{i:02d}.pth", part)
        params = {
            **{"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"]},
            **{"n_heads": config["num_attention_heads"], "norm_eps": config["rms_norm_eps"]},
            **{"n_kv_heads": config["num_key_value_heads"], "vocab_size": -1},
        }
        (folder / "params.json").write_text(json.dumps(params))
        return folder

    return write


LAYER = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
OUTSIDE = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}


def meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name of a tensor, and the axis along which its parts are cut."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    new, axis = LAYER[rest.removesuffix(".weight")]
    return f"layers.{layer}.{new}.weight", axis


def neighbours(weight: mx.array, config: dict) -> mx.array:
    """Dimensions d and d + D / 2 of each head become 2d and 2d + 1, as Meta's rope turns them."""
    size = config["hidden_size"] // config["num_attention_heads"]
    order = mx.array([i + half * size // 2 for i in range(size // 2) for half in (0, 1)])
    return weight.reshape(-1, size, weight.shape[1])[:, order].reshape(weight.shape)


FORMATS = {
    "safetensors": safetensors,
    "sharded safetensors": sharded,
    ".bin": pickled,
    ".bin before PyTorch 1.6": old_pickled,
    "sharded .bin": pickled_shards,
    "bare .pth": bare,
    "training .pt": nested,
    "Lightning .ckpt": lightning,
    "Meta, 1 part": meta(1),
    "Meta, 2 parts": meta(2),
}
