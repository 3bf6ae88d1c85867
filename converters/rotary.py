"""Ask the rotary modules of a built model whether they rotate as the config says.

Reading a field is no proof: several mlx-lm classes declare `rope_scaling` and never use it. So the
modules themselves rotate a vector of ones, and the result is compared with transformers' formulas.
"""

import math
import re

import mlx.core as mx
import numpy as np

from mlx_specstream.errors import BadCheckpoint

FAR = 4096  # position of the probe; far enough that a factor on low frequencies shows
TOLERANCE = 4e-3  # float32 at position FAR is right to about 5e-4


def inverse_frequencies(rope: dict, dims: int, longest: int) -> tuple[np.ndarray, float] | None:
    """Angles per position [dims / 2] and the scale of the rotated vector, as in transformers.

    None for a kind of rotary embedding that has no fixed formula here.
    """
    kind, base = rope.get("rope_type") or rope.get("type") or "default", rope["rope_theta"]
    plain = 1.0 / base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    if kind == "dynamic" or kind == "default":  # dynamic is plain up to the context length
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        return llama3(plain, rope), 1.0
    if kind == "yarn":
        factor = factor or longest / original
        return yarn(plain, dims, base, {**rope, "factor": factor}), yarn_scale(rope, factor)
    if kind == "longrope":
        factor = factor or longest / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return plain / np.array(rope["long_factor"]), rope.get("attention_factor") or scale
    return None


def llama3(plain: np.ndarray, rope: dict) -> np.ndarray:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (smooth + (1 - smooth) / rope["factor"])


def yarn(plain: np.ndarray, dims: int, base: float, rope: dict) -> np.ndarray:
    def corrected(turns):
        length = rope["original_max_position_embeddings"]
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = corrected(rope.get("beta_fast") or 32), corrected(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    return plain * (ramp / rope["factor"] + 1 - ramp)


def yarn_scale(rope: dict, factor: float) -> float:
    def scale(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale()


def difference(module, rope: dict, head_dim: int, longest: int) -> float | None:
    """Largest difference between a module's rotated ones and the formula's, either layout."""
    dims = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    formula = inverse_frequencies(rope, dims, longest)
    # A module that rotates more than a head works on another layout than this formula.
    if formula is None or (getattr(module, "dims", None) or 0) > head_dim:
        return None
    position = min(FAR, longest - 1)
    angles, scale = formula[0] * position, formula[1]
    pairs = scale * np.stack([np.cos(angles) - np.sin(angles), np.cos(angles) + np.sin(angles)])
    rest = np.ones(head_dim - 2 * pairs.shape[1])
    got = np.array(module(mx.ones((1, 1, 1, head_dim)), offset=position)).reshape(-1)
    # Halves side by side (most), or neighbours as pairs (`traditional`).
    layouts = [
        np.concatenate([pairs.reshape(-1), rest]),
        np.concatenate([pairs.T.reshape(-1), rest]),
    ]
    return min(float(np.abs(got - layout).max()) for layout in layouts)


def check_rotary(model, view: dict | None, name: str) -> list[str]:
    """Compare every rotary module under `layers.N` with the transformers view of the config.

    Returns: notes. Raises: BadCheckpoint when a layer would rotate differently.
    """
    parameters = (view or {}).get("rope_parameters")
    # Latent attention rotates a part of its own; its scale is folded in elsewhere.
    if not parameters or "qk_rope_head_dim" in view or "text_config" in view:
        return []
    head_dim = view.get("head_dim") or view["hidden_size"] // view["num_attention_heads"]
    longest = view.get("max_position_embeddings") or FAR
    kinds, notes, seen = view.get("layer_types") or [], [], {}
    for path, module in model.named_modules():
        layer = re.search(r"\blayers\.(\d+)\.", path)
        if layer is None or "RoPE" not in type(module).__name__:
            continue
        kind = kinds[int(layer[1])] if int(layer[1]) < len(kinds) else None
        rope = parameters.get(kind, parameters)
        if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
            continue
        if (kind, repr(module)) in seen:  # layers of one kind share their setting
            continue
        seen[kind, repr(module)] = True
        notes += judge(module, rope, head_dim, longest, f"{name}, layer {layer[1]}")
    return notes


def judge(module, rope: dict, head_dim: int, longest: int, where: str) -> list[str]:
    off = difference(module, rope, head_dim, longest)
    if off is None or off < TOLERANCE:
        return []
    if rope.get("truncate") is False:
        rounded = difference(module, {**rope, "truncate": True}, head_dim, longest)
        if rounded < TOLERANCE:
            return [
                "yarn: mlx-lm rounds the correction range where this config says truncate=false; "
                "logits differ slightly from transformers"
            ]
    asked = {key: value for key, value in rope.items() if not isinstance(value, list)}
    raise BadCheckpoint(
        f"mlx-lm's class {where} would not rotate as the config says ({asked}): the setting is "
        f"dropped or computed differently (off by {off:.2g} at position {min(FAR, longest - 1)})"
    )
