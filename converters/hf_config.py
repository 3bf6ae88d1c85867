"""config.json of transformers, written the way the target mlx-lm class reads it.

transformers 5 keeps all rotary settings in `rope_parameters`; most mlx-lm classes read
`rope_theta`, `rope_scaling` and `partial_rotary_factor` and silently ignore the rest. Both sides
also have defaults, and they differ (mlx-lm ties the embeddings of a Llama without the key,
transformers does not), so the transformers view of a config decides what a missing key means.
"""

import copy
import inspect

from mlx_specstream.errors import BadCheckpoint, SpecStreamError, UnsupportedModel
from mlx_specstream.model.architectures import model_classes

from .dropped import check_dropped

# Keys that GPT-NeoX style classes read under another name.
OLD_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")

# A Mistral with layer types is a class of its own in transformers; mlx-lm has one for both.
SAME_FAMILY = {"ministral": "mistral"}

# mlx-lm has always run these families without their window, and their released checkpoints all
# carry one: refusing would refuse the family.
WINDOW_IGNORED = {"gemma2", "mistral", "phi3", "phimoe", "starcoder2"}
# transformers windows every layer of these when `sliding_window` is set and there is no layer list.
WINDOW_EVERYWHERE = {"mistral", "mixtral", "phi3", "phimoe", "starcoder2"}

DEVIATIONS = {
    "gemma3_text": "mlx-lm rounds the embedding scale to bfloat16, as transformers does in "
    "bfloat16: float32 logits differ in the third digit",
    "gemma": "mlx-lm computes GELU exactly where transformers uses the tanh approximation",
    "gpt_neox": "mlx-lm approximates GELU where transformers computes it exactly",
}


def transformers_view(config: dict) -> dict | None:
    """The config with every default of transformers filled in, or None for an unknown family."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    model_type = config.get("model_type")
    if model_type == "mistral" and config.get("layer_types"):
        model_type = "ministral"  # what transformers' AutoModel makes of it
    if model_type not in CONFIG_MAPPING:
        return None
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        skip = ("auto_map", "model_type", "dtype", "torch_dtype")
        known = {k: v for k, v in config.items() if k not in skip}
        made = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(known))
        view = made.to_dict()
        # Settings that transformers has given another name since; mlx-lm reads the first one.
        return {k: view[new] for k, new in made.attribute_map.items() if new in view} | view
    except Exception as error:  # a config class validates by whatever its author chose to raise
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"config.json is not a valid {model_type!r} config: {reason}") from None
    finally:
        logging.set_verbosity(level)


def normalise(config: dict) -> tuple[dict, list[str]]:
    """Rewrite a Hugging Face config for its mlx-lm class.

    Returns: a new config and notes for the user (where mlx-lm differs by design).
    Raises: UnsupportedModel when mlx-lm lacks the architecture; BadCheckpoint when a setting that
    changes the logits would be dropped, or has the wrong type.
    """
    config, notes = copy.deepcopy(config), []
    family = config.get("model_type")
    if isinstance(family, str):
        config["model_type"] = SAME_FAMILY.get(family, family)
    args_class = model_classes(config)[1]
    text = config.get("text_config")
    try:
        if isinstance(text, dict):  # a multimodal wrapper around a text model
            if isinstance(text.get("model_type"), str) and has_class(text):
                config["text_config"], notes = normalise(text)
        else:
            rewrite(config, args_class, notes)
    except SpecStreamError:
        raise
    except Exception as error:  # a setting may be of any kind and size, and is used in many ways
        raise BadCheckpoint(f"config.json holds a value of the wrong kind: {error!r}") from None
    return with_dtype(config), notes


def rewrite(config: dict, args_class: type, notes: list) -> None:
    """`normalise` for one text model, in place."""
    view = transformers_view(config)
    full = {**config, **{k: v for k, v in (view or {}).items() if v is not None or k not in config}}
    if view is not None and view.get("sliding_window") is None:
        full["sliding_window"] = None  # e.g. Qwen2 with use_sliding_window off
    full["model_type"] = config["model_type"]
    name = args_class.__module__.rpartition(".")[2]
    fields = frozenset(inspect.signature(args_class).parameters)
    rope = write_rope(config, full, fields, notes, name)
    write_window(config, full, fields, notes, name)
    fill_defaults(config, view, fields)
    asked = {key: value for key, value in full.items() if key not in ROPE_KEYS}
    asked.update((key, value) for key, value in rope.items() if value is not None)
    check_dropped(asked, fields, name)
    if config["model_type"] in DEVIATIONS:
        notes.append(DEVIATIONS[config["model_type"]])


def has_class(config: dict) -> bool:
    try:
        model_classes(config)
    except UnsupportedModel:
        return False
    return True


def with_dtype(config: dict) -> dict:
    """transformers 5 says `dtype`, older readers and mlx-lm say `torch_dtype`: keep both."""
    dtype = config.get("torch_dtype") or config.get("dtype")
    if isinstance(dtype, str):
        config["dtype"] = config["torch_dtype"] = dtype.removeprefix("torch.")
    return config


def fill_defaults(config: dict, view: dict | None, fields: frozenset) -> None:
    """Write the default of transformers for each field of the class that the config leaves out."""
    for key in fields - {*ROPE_KEYS, *OLD_NAMES.values(), "rope_parameters", "model_type"}:
        if config.get(key) is None and (view or {}).get(key) is not None:
            config[key] = view[key]
    if "n_ctx" in fields and "n_ctx" not in config and "n_positions" in config:
        config["n_ctx"] = config["n_positions"]  # GPT-2's old name, which transformers 5 drops


def write_rope(config: dict, full: dict, fields: frozenset, notes: list, name: str) -> dict:
    """Move `rope_parameters` into the keys that the class reads.

    Returns: what was asked for, under the flat names, for the check of dropped settings.
    """
    parameters = full.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return {key: config[key] for key in ROPE_KEYS if key in config}
    if "rope_parameters" in fields and "rope_theta" not in fields:
        config["rope_parameters"] = parameters  # the class reads the new form itself
        return {}
    if "rope_parameters" not in fields:
        config.pop("rope_parameters", None)
    wanted = flat_rope(parameters, full, fields, name)
    asked = {}
    for key, value in wanted.items():
        field = OLD_NAMES[key] if OLD_NAMES.get(key) in fields else key
        if field in fields and (value is not None or key == "rope_scaling"):
            config[field] = value
        if field == key:
            asked[key] = value
    scaling = wanted["rope_scaling"] or {}
    if scaling.get("type") == "longrope":
        original = scaling.get("original_max_position_embeddings")
        if "original_max_position_embeddings" in fields and original:
            config["original_max_position_embeddings"] = original
        notes.append(
            "longrope: mlx-lm always uses the long factors; transformers uses the short ones up to "
            f"{original} tokens, so logits differ below that length"
        )
    return asked


def flat_rope(parameters: dict, full: dict, fields: frozenset, name: str) -> dict:
    """rope_theta, rope_scaling, partial_rotary_factor (and Gemma 3's local base) of a config."""
    nested = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    if not nested:
        return split_rope(parameters)
    used = set(full.get("layer_types") or nested)
    kinds = {kind: split_rope(nested[kind]) for kind in used & set(nested)}
    main = kinds.get("full_attention") or next(iter(kinds.values()))
    local = kinds.get("sliding_attention", main)
    if "rope_local_base_freq" in fields and local["rope_scaling"] is None:
        return {**main, "rope_local_base_freq": local["rope_theta"]}
    # olmo3 scales the full layers only, with one base for both.
    scaled_full_only = name == "olmo3" and local == {**main, "rope_scaling": None}
    if any(kind != main for kind in kinds.values()) and not scaled_full_only:
        raise BadCheckpoint(
            f"'rope_parameters' differs between layer types ({', '.join(sorted(kinds))}) but "
            f"mlx-lm's class {name!r} has one rotary setting for all layers"
        )
    return main


def split_rope(parameters: dict) -> dict:
    """One `rope_parameters` dict as the three keys that came before it."""
    scaling = {
        k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")
    }
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if "factor" in scaling and type(scaling["factor"]) is int:
        scaling["factor"] = float(scaling["factor"])  # phi3 asserts a float
    return {
        "rope_theta": parameters.get("rope_theta"),
        # Some classes read `type`, some `rope_type`.
        "rope_scaling": None if kind == "default" else {**scaling, "type": kind, "rope_type": kind},
        "partial_rotary_factor": parameters.get("partial_rotary_factor"),
    }


def windowed_layers(full: dict) -> list[bool]:
    """Which layers see only the last `sliding_window` tokens in transformers."""
    count, window = full.get("num_hidden_layers") or 0, full.get("sliding_window")
    types = full.get("layer_types")
    if not window or window >= (full.get("max_position_embeddings") or 1 << 62):
        return [False] * count
    if isinstance(types, list):
        return [kind == "sliding_attention" for kind in types]
    return [full["model_type"] in WINDOW_EVERYWHERE] * count


def write_window(config: dict, full: dict, fields: frozenset, notes: list, name: str) -> None:
    """Tell the class which layers are windowed, or say what happens when it cannot know."""
    layers, window = windowed_layers(full), full.get("sliding_window")
    kinds = full.get("layer_types") or []
    family, told = full["model_type"], "layer_types" in fields
    if any(layers) and family in WINDOW_IGNORED and not (told and kinds):
        notes.append(f"mlx-lm runs {family} without its window: exact up to {window} tokens")
    elif told:
        if layers and all(layers):
            raise BadCheckpoint(
                f"'sliding_window' is {window} in every layer but mlx-lm's class {name!r} needs "
                "one layer of full attention; set it to null in config.json for a model that is "
                f"exact up to {window} tokens"
            )
        if set(kinds) == {"sliding_attention"}:  # the window is as wide as the context
            kinds = ["full_attention"] * len(kinds)
        if kinds:
            config["layer_types"] = kinds
    elif "sliding_window_pattern" in fields and kinds:
        config["sliding_window_pattern"] = pattern_of(kinds, name)
    elif "sliding_window" not in fields and any(layers):
        raise BadCheckpoint(
            f"'sliding_window' is {window} but mlx-lm's class {name!r} has no window; set it "
            f"to null in config.json for a model that is exact up to {window} tokens"
        )


def pattern_of(kinds: list[str], name: str) -> int | str | None:
    """`layer_types` as Gemma 3 and Cohere 2 count them (a period), or as EXAONE 4 spells them."""
    full = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    if name == "exaone4" and full:
        return "".join("G" if kind == "full_attention" else "L" for kind in kinds)
    regular = full and full == list(range(full[0], len(kinds) + 1, full[0]))
    if not regular:
        raise BadCheckpoint(
            f"'layer_types' has full attention in layers {full} of {len(kinds)}, which is not "
            f"every n-th layer; mlx-lm's class {name!r} only knows 'sliding_window_pattern'"
        )
    return full[0]
