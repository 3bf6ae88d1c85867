"""Settings that change the logits and that the target mlx-lm class would not read."""

from mlx_specstream.errors import BadCheckpoint

# Key -> values that mean "off". Biases are not listed: their tensors are accounted for one by one.
# A key that transformers' own class for the family knows is judged by that family's default
# instead, because that is what the mlx-lm class for the family hard-codes.
NEUTRAL = {
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "rope_local_base_freq": (None,),
    "partial_rotary_factor": (None, 1.0),
    "original_max_position_embeddings": (None,),
    "head_dim": (None,),
    "hidden_act": (None,),
    "hidden_activation": (None,),
    "activation_function": (None,),
    "tie_word_embeddings": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None,),
    "num_experts_per_tok": (None,),
    "norm_topk_prob": (None,),
    "routed_scaling_factor": (None, 1),
    "scoring_func": (None,),
    "rms_norm_eps": (None,),
    "layer_norm_eps": (None,),
    "layer_norm_epsilon": (None,),
    "use_parallel_residual": (None,),
    "position_embedding_type": (None, "rope", "absolute"),
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "alibi": (None, False),
    "attention_sink_size": (None, 0),
}

# Meaningless without experts: in a dense family they are left over from something else.
EXPERT_KEYS = {"num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func"}

# Spellings of the same activation; mlx-lm's gelu_approx is the tanh form.
SAME = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_pytorch": "gelu",
}

# (class, key) that need no field: the class sees the answer in the weights.
SEEN_IN_WEIGHTS = {
    ("gemma3_text", "tie_word_embeddings"),
    ("minicpm", "tie_word_embeddings"),
    ("recurrent_gemma", "tie_word_embeddings"),
}


def check_dropped(config: dict, fields: frozenset, name: str) -> None:
    """Refuse a setting that would silently be lost.

    `config`: flat keys, rotary ones under their old names; `fields`: what the ModelArgs of class
    `name` reads. Keys outside the table are foreign and harmless.
    Raises: BadCheckpoint naming the key, its value and the class.
    """
    defaults = family_defaults(config.get("model_type"))
    for key, off in NEUTRAL.items():
        if key in fields or key not in config or (name, key) in SEEN_IN_WEIGHTS:
            continue
        if key in EXPERT_KEYS and defaults and key not in defaults:
            continue
        value = config[key]
        if key in defaults and defaults[key] is not None:
            off = (defaults[key],)
        if key == "head_dim":
            if "qk_rope_head_dim" in fields:  # latent attention has its own sizes
                continue
            off = (None, derived_head_dim(config))
        if key == "query_pre_attn_scalar":  # the usual scale, written out
            off = (*off, config.get("head_dim"))
        if not any(same(value, neutral) for neutral in off):
            raise BadCheckpoint(
                f"config.json sets {key!r} to {str(value)[:80]!r} but mlx-lm's class {name!r} does "
                "not read it, so its logits would be wrong"
            )


def same(value, neutral) -> bool:
    if isinstance(value, str) and isinstance(neutral, str):
        return SAME.get(value, value) == SAME.get(neutral, neutral)
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def derived_head_dim(config: dict) -> int | None:
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return width // heads if width and heads else None


def family_defaults(model_type) -> dict:
    """What transformers assumes for a family; empty for a family it does not know."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    view = CONFIG_MAPPING[model_type]().to_dict()
    rope = view.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return {**view, **{k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}}
