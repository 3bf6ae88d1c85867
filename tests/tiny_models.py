"""Tiny random models of every architecture that the tests cover, and streams for them."""

from __future__ import annotations

from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream.config import StreamConfig
from mlx_specstream.model.architectures import model_classes
from mlx_specstream.model.projections import embedding_of, hidden_size, stream_shapes, weight_shape
from mlx_specstream.model.seams import Seams, attach
from mlx_specstream.model.streams import Streams

VOCABULARY = 67
WINDOW = 4  # smaller than any prompt plus tree here, so that windows cut through trees

# Every size differs from every other: width 64, heads 4, K/V heads 2, head 24, inner 160.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
NO_HEAD_DIM = {"hidden_size": 96, "head_dim": None}  # classes that compute the head size: 96 / 4
SLIDING = ["sliding_attention", "full_attention"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "type": "longrope",
    "long_factor": [1.0 + 0.3 * i for i in range(9)],
    "short_factor": [1.0] * 9,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 5}

# name -> what differs from COMMON; the part of the name before ":" is the model_type.
CONFIGS = {
    "llama": {"tie_word_embeddings": False},
    "llama:llama3-rope": {"rope_scaling": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    "llama:linear-rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama:traditional-rope": {"rope_traditional": True},
    "mistral": {"layer_types": [*SLIDING, *SLIDING, SLIDING[0]], "sliding_window": WINDOW},
    "qwen2": {**NO_HEAD_DIM},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3:yarn": {"tie_word_embeddings": False, "rope_scaling": YARN},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [3],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        **NO_HEAD_DIM,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "tie_word_embeddings": False,
    },
    "olmoe": {**NO_HEAD_DIM, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {**NO_HEAD_DIM, **MOE},
    "phi": {**NO_HEAD_DIM, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {
        **NO_HEAD_DIM,
        "rope_scaling": LONGROPE,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
    },
    "gemma2": {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 5000.0,
        "query_pre_attn_scalar": 20,
    },
    "gpt_oss": {
        **MOE,
        "layer_types": [*SLIDING, *SLIDING, SLIDING[0]],
        "sliding_window": WINDOW,
        "rope_scaling": YARN,
    },
    "smollm3": {**NO_HEAD_DIM, "no_rope_layer_interval": 2},
    "olmo2": {**NO_HEAD_DIM},
    "olmo3": {
        "layer_types": [*SLIDING, *SLIDING, SLIDING[0]],
        "sliding_window": WINDOW,
    },
    "cohere": {**NO_HEAD_DIM, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {
        "hidden_size": 96,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "layer_norm_bias": False,
    },
    "stablelm": {
        **NO_HEAD_DIM,
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.5,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": True,
    },
    "stablelm:parallel": {
        **NO_HEAD_DIM,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.25,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
    },
    "starcoder2": {**NO_HEAD_DIM},
    "granite": {
        **NO_HEAD_DIM,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "exaone4": {
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3_ROPE,
        "sliding_window": WINDOW,
        "sliding_window_pattern": "LG",
    },
    "internlm2": {**NO_HEAD_DIM, "bias": True},
    "seed_oss": {"attention_bias": True},
    "ministral3": {
        "layer_types": [*SLIDING, *SLIDING, SLIDING[0]],
        "sliding_window": WINDOW,
        "rope_parameters": {**YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.7},
    },
    "gpt2": {
        **{"n_embd": 96, "n_head": 4, "n_layer": 5, "n_positions": 90, "n_ctx": 90},
        "layer_norm_epsilon": 1e-5,
    },
    "opt": {**NO_HEAD_DIM, "ffn_dim": 160, "max_position_embeddings": 90},
    "opt:350m": {
        **NO_HEAD_DIM,
        "ffn_dim": 160,
        "max_position_embeddings": 90,
        "word_embed_proj_dim": 40,
        "do_layer_norm_before": False,
    },
}


def make_model(name: str = "llama", seed: int = 0, **changes) -> nn.Module:
    """A random model; ``name`` of CONFIGS. Norms, biases and sinks are random too."""
    kind = name.partition(":")[0]
    config = {**COMMON, **CONFIGS[name], **changes, "model_type": kind}
    config = {k: v for k, v in config.items() if v is not None}
    mx.random.seed(seed)
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))

    def shake(path, p):
        if p.ndim < 2:  # norms, biases, sinks
            return p + 0.2 * mx.random.normal(p.shape)
        return 1.7 * p

    model.update(tree_map_with_path(shake, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def quantized(model: nn.Module, bits: int = 4) -> nn.Module:
    nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model


def make_streams(model: nn.Module, config: StreamConfig, seed: int = 1) -> Streams:
    """Streams whose every parameter is random, the B matrices of LoRA and early exit too."""
    mx.random.seed(seed)
    narrow = weight_shape(embedding_of(model))[1]
    shapes = stream_shapes(model, config)
    streams = Streams(config, hidden_size(model), shapes, 0.3, token_width=narrow)
    return randomized(streams, seed)


def randomized(streams: Streams, seed: int) -> Streams:
    mx.random.seed(seed + 1000)
    new = [
        (path, 0.3 * mx.random.normal(p.shape) if path.endswith(".b") else p)
        for path, p in tree_flatten(streams.parameters())
    ]
    streams.update(tree_unflatten(new))
    mx.eval(streams.parameters())
    return streams


def without_lora(streams: Streams) -> Streams:
    """The same streams with the adapter at zero (B = 0)."""
    zero = [
        (p, mx.zeros_like(v)) for p, v in tree_flatten(streams.parameters()) if p.endswith(".b")
    ]
    streams.update(tree_unflatten(zero))
    return streams


def attached(name: str = "llama", seed: int = 0, bits: int = 0, **config) -> Seams:
    """A random model with random streams in it; ``bits``: quantized."""
    model = make_model(name, seed)
    model = quantized(model, bits) if bits else model
    settings = {"num_streams": 3, "msa_layers": 2, "lora_rank": 6, "lora_alpha": 9.0, **config}
    return attach(model, make_streams(model, StreamConfig(**settings)))


def make_tokenizer(vocabulary: int = VOCABULARY, chat: bool = False, ends: bool = True):
    """A real tokenizer of the words "a0", "a1", ...: "a1" begins a text, "a0" may end it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"a{i}": i for i in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="a2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    special = {"bos_token": "a1", **({"eos_token": "a0"} if ends else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'a3' if m.role == 'user' else 'a4' }} {{ m.content }}"
            "{{ ' a0 ' if m.role == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}a4{% endif %}"
        )
    return TokenizerWrapper(tokenizer)


@contextmanager
def before_layer(model: nn.Module, index: int, change):
    """Stock model in which ``change`` (hidden -> hidden) comes before layer ``index``.

    The tests' own way into the middle of a stock forward: it shares nothing with the seams.
    """
    layer = model.layers[index]
    stock = type(layer)

    class Hooked(stock):
        def __call__(self, x, *args, **kwargs):
            return super().__call__(change(x), *args, **kwargs)

    layer.__class__ = Hooked
    try:
        yield
    finally:
        layer.__class__ = stock


def stock_hidden(model: nn.Module, tokens: list[int], cut: int) -> mx.array:
    """What the stock model feeds to layer ``cut``, [L, E]."""
    caught = []

    def catch(x):
        caught.append(x[0])
        return x

    with before_layer(model, cut, catch):
        mx.eval(model(mx.array([tokens])))
    return caught[0]


def stock_logits(model: nn.Module, hidden: mx.array, cut: int) -> mx.array:
    """Logits [L, V] of the stock layers from ``cut`` on, run causally over hidden [L, E]."""
    with before_layer(model, cut, lambda x: hidden[None]):
        logits = model(mx.zeros((1, hidden.shape[0]), dtype=mx.int32))[0]
        mx.eval(logits)
    return logits


# Attribute of a stock layer -> our names of its column blocks, where they differ.
BLOCKS = {
    "c_attn": ["q_proj", "k_proj", "v_proj"],
    "attn.c_proj": ["o_proj"],
    "out_proj": ["o_proj"],
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "dense": ["o_proj"],
    "wo": ["o_proj"],
    "fc1": ["up_proj"],
    "c_fc": ["up_proj"],
    "w3": ["up_proj"],
    "w1": ["gate_proj"],
    "fc2": ["down_proj"],
    "c_proj": ["down_proj"],
    "w2": ["down_proj"],
}


def merge_lora(model: nn.Module, streams: Streams) -> int:
    """Add the adapters to the weights of the upper layers, for all rows; returns how many."""
    merged = 0
    for layer, lora in zip(model.layers[-len(streams.lora) :], streams.lora, strict=True):
        for path, module in layer.named_modules():
            owner, name = path.split(".")[-2:] if "." in path else ("", path)
            blocks = BLOCKS.get(f"{owner}.{name}") or BLOCKS.get(name, [name])
            if owner == "switch_mlp" and f"switch_mlp_{name}" in lora:  # beside a shared expert
                blocks = [f"switch_mlp_{name}"]
            if blocks[0] in lora:
                update = mx.concatenate([lora[b].a @ lora[b].b for b in blocks], axis=1).T
                module.weight = module.weight + streams.config.lora_scale * update  # experts: each
                merged += len(blocks)
    return merged
