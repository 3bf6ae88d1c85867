"""Checkpoints as Meta and Mistral publish them: `consolidated.*.pth` and `params.json`.

Names differ from transformers', rope turns neighbouring dimensions instead of halves, and a large
model is cut into parts: rows of some matrices, columns of others.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint, UnsupportedModel

from .plausible import check_plausible
from .weights import read_json, require_files

PARAMS = "params.json"
FILES = ("consolidated*.pth", "consolidated*.safetensors")
# Meta's name -> transformers' name, and the axis along which parts are joined (None: all alike).
OUTSIDE = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
INSIDE = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
COMPUTED = "rope.freqs"  # a table that the settings give anew
TOKENIZER = "tokenizer.model"
SENTENCEPIECE = '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}\n'


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS).is_file() and bool(meta_files(folder))


def meta_files(folder: Path) -> list[Path]:
    """The parts, in order. Raises: BadCheckpoint when one of a numbered row is missing."""
    for pattern in FILES:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        numbers = [re.search(r"\.(\d+)\.", path.name) for path in files]
        if files and all(numbers):
            first = files[0].name
            names = {
                re.sub(r"\.\d+\.", f".{i:02d}.", first)
                for i in range(min(int(numbers[-1][1]), 999) + 1)
            }
            require_files(folder, names)
        if files:
            return files
    return []


def translate(name: str) -> tuple[str, int | None] | None:
    """transformers' name of a tensor, and along which axis its parts are joined."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found and found[2] in INSIDE:
        new, axis = INSIDE[found[2]]
        return f"model.layers.{found[1]}.{new}", axis
    return None


def read_params(folder: Path) -> dict:
    """The settings of params.json. Raises: as `config_of`."""
    params = read_json(folder / PARAMS)
    check_plausible(params, PARAMS)
    for key in ("dim", "n_layers", "n_heads"):
        if type(params.get(key)) is not int or params[key] < 1:
            raise BadCheckpoint(
                f"{folder / PARAMS}: {key!r} must be a positive int but is {params.get(key)!r}"
            )
    heads = params.get("n_kv_heads")
    if heads is not None and (type(heads) is not int or heads < 1):
        raise BadCheckpoint(f"{folder / PARAMS}: 'n_kv_heads' must be an int but is {heads!r}")
    for key in ("rope_scaling_factor", "high_freq_factor"):
        if key in params and not isinstance(params[key], int | float):
            raise BadCheckpoint(
                f"{folder / PARAMS}: {key!r} must be a number but is {params[key]!r}"
            )
    for key in ("moe", "quantization", "vision_encoder", "lora", "yarn"):
        if params.get(key):
            raise UnsupportedModel(
                f"{folder / PARAMS}: {key!r} is set; only dense text models are read in this "
                "format, use the Hugging Face form of this checkpoint"
            )
    return params


def config_of(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """config.json as transformers would write it.

    Args:
        shapes: of the joined tensors, by transformers' names: sizes that params.json leaves to a
            formula are read from there.

    Raises: BadCheckpoint for a missing or broken setting; UnsupportedModel for what these files
        cannot tell.
    """
    params = read_params(folder)
    heads = params["n_heads"]
    try:
        vocabulary = shapes["model.embed_tokens.weight"][0]
        inner = shapes["model.layers.0.mlp.gate_proj.weight"][0]
    except KeyError as error:
        raise BadCheckpoint(f"{folder}: tensor {error} is missing") from None
    mistral = "hidden_dim" in params
    config = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": inner,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or params["dim"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "max_position_embeddings": params.get("max_seq_len") or 2048,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }
    if mistral:
        config["sliding_window"] = params.get("sliding_window")
    if params.get("use_scaled_rope"):
        if "rope_scaling_factor" not in params:
            raise UnsupportedModel(
                f"{folder / PARAMS}: 'use_scaled_rope' without 'rope_scaling_factor' does not say by "
                "how much; give the Hugging Face folder of the same model with --base"
            )
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params["rope_scaling_factor"]),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.get("high_freq_factor", 4.0)),
            "original_max_position_embeddings": 8192,
        }
    return config


def joined_shapes(
    parts: list[dict[str, tuple[int, ...]]], width: int
) -> dict[str, tuple[int, ...]]:
    """Shape of each joined tensor by transformers' name.

    Raises: BadCheckpoint for a name that is unknown, or not in every part.
    """
    shapes = {}
    for name in sorted(set().union(*parts)):
        if name == COMPUTED:
            continue
        if translate(name) is None:
            raise BadCheckpoint(f"tensor {name!r} is unknown in a {PARAMS} checkpoint")
        if not all(name in part for part in parts):
            raise BadCheckpoint(f"tensor {name!r} is not in every part")
        new, axis = translate(name)
        shape = list(parts[0][name])
        if {len(part[name]) for part in parts} != {1 if axis is None else 2}:
            raise BadCheckpoint(f"tensor {name!r} has the shape {shape}")
        axis = split_axis(new, axis, parts[0][name], width)
        if axis is not None:
            shape[axis] = sum(part[name][axis] for part in parts)
        shapes[new] = tuple(shape)
    return shapes


def split_axis(new: str, axis: int | None, shape: tuple[int, ...], width: int) -> int | None:
    """Llama 3 cuts its embedding by tokens, the others by columns: the width tells."""
    whole = new == "model.embed_tokens.weight" and shape[-1] == width
    return 0 if whole else axis


def joined(
    names: list[str], parts: list[Callable[[str], mx.array]], params: dict
) -> Iterator[tuple[str, mx.array]]:
    """The tensors as transformers has them, one at a time.

    Args:
        parts: each gives a tensor of one file by Meta's name.
    """
    heads = params["n_heads"]
    turned = {"q_proj": heads, "k_proj": params.get("n_kv_heads") or heads}
    for name in names:
        if name == COMPUTED:
            continue
        new, axis = translate(name)
        pieces = [part(name) for part in parts]
        axis = split_axis(new, axis, pieces[0].shape, params["dim"])
        whole = pieces[0] if axis is None or len(pieces) == 1 else mx.concatenate(pieces, axis=axis)
        if (kind := new.split(".")[-2]) in turned:
            whole = halves(whole, turned[kind])
        yield new, whole


def halves(weight: mx.array, heads: int) -> mx.array:
    """Rows [H * D, E] of a projection reordered, so that rope turns dimension d with d + D/2.

    Meta's rope turns 2d with 2d + 1; transformers' rotates halves.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, width)
