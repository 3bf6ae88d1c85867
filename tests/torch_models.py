"""Tiny random models of transformers, as the tests of the converters and their golden files use them.

Every setting that a converter could lose is far from its default, and all sizes differ. Lengths are
chosen where mlx-lm agrees with transformers: Gemma 2 within its window, longrope beyond the original
context (mlx-lm always uses the long factors), Gemma 3 with a width whose root is exact in bfloat16
(mlx-lm rounds it).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LENGTH = 22  # tokens; longer than every window but Gemma 2's
SHAPE = {
    "vocab_size": 43,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 15000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 20000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.7, 3.5],
}
LINEAR = {"rope_type": "linear", "rope_theta": 7e4, "factor": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 3e5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# name -> settings; the model type is the name without what stands behind a family's name here.
VARIANTS = ("_bf16", "_plain", "_350m", "_untied")
MODELS = {
    "llama": {"head_dim": 10, "attention_bias": True, "rope_parameters": LLAMA3},
    "llama_bf16": {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "mistral": {"head_dim": 8, "sliding_window": 9, "layer_types": MIXED, "rope_parameters": PLAIN},
    "qwen2": {"rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 14, "rope_parameters": {**LINEAR, "rope_theta": 9e5}},
    "phi3": {
        "hidden_size": 32,
        "original_max_position_embeddings": 16,
        "sliding_window": None,
        "rope_parameters": LONGROPE,
    },
    "gemma2": {
        "head_dim": 10,
        "sliding_window": 64,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 7.0,
        "rope_parameters": PLAIN,
    },
    "gemma3_text": {
        "hidden_size": 36,
        "intermediate_size": 44,
        "head_dim": 12,
        "sliding_window": 9,
        "query_pre_attn_scalar": 20,
        "num_hidden_layers": 4,
        "layer_types": [*MIXED, "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        },
    },
    "mixtral": {
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "sliding_window": None,
        "rope_parameters": PLAIN,
    },
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 1],
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3,
    },
    "olmo2": {"rope_parameters": YARN, "tie_word_embeddings": False},
    "gpt_oss": {  # expert weights as MXFP4, in blocks of 32, as it is published
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 14,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "sliding_window": 9,
        "layer_types": MIXED[:2],
        "rope_parameters": YARN,
    },
    "llama_plain": {"head_dim": 6, "tie_word_embeddings": False},  # Llama 2, OpenLLaMA, Vicuna
    "qwen3_moe": {
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN,
    },
    "ministral3": {
        "head_dim": 10,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0},
            **{"original_max_position_embeddings": 8, "beta_fast": 8.0, "beta_slow": 1.0},
            **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    },
    "mamba": {  # recurrent: converts, but cannot have streams
        **{"state_size": 6, "conv_kernel": 4, "time_step_rank": 5, "expand": 2},
        "tie_word_embeddings": True,
    },
    "qwen3_next": {  # three of four layers are recurrent (gated delta)
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 6, "linear_conv_kernel_dim": 4, "head_dim": 8},
        **{"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        **{"shared_expert_intermediate_size": 28, "num_hidden_layers": 4},
        "tie_word_embeddings": False,
        "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
    },
    "gpt2": {"n_embd": 24, "n_head": 4, "n_layer": 3, "max_position_embeddings": 40},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 36, "max_position_embeddings": 40},
    "opt_350m": {
        "word_embed_proj_dim": 14,
        "do_layer_norm_before": False,
        "ffn_dim": 36,
        "max_position_embeddings": 40,
    },
    "opt_untied": {
        **{"ffn_dim": 36, "max_position_embeddings": 40, "enable_bias": False},
        **{"activation_function": "gelu", "layer_norm_elementwise_affine": False},
        "tie_word_embeddings": False,
    },
    "phi": {
        "head_dim": None,
        "hidden_size": 32,
        "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25},
    },
}


def family_of(name: str) -> str:
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    return name


def build(name: str, folder: Path, **changes):
    """A random model whose logits depend on every setting: weights far above the usual 0.02.

    Its config.json is written to the folder and read back, as users load it: `mistral` with layer
    types becomes another class there.
    """
    torch.manual_seed(sum(map(ord, name)))
    settings = {**SHAPE, **MODELS[name], **changes}
    settings = {k: v for k, v in settings.items() if k != "head_dim" or v}
    (folder / "config.json").write_text(json.dumps({"model_type": family_of(name), **settings}))
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            spread = 0.3 if value.ndim > 1 else 0.1
            value.add_(torch.randn_like(value) * spread)
            if name.endswith("bf16"):
                value.copy_(value.bfloat16().float())
            assert value.isfinite().all(), key
    return model


def logits_of(model, tokens: list[int]):
    """float32 [L, V]"""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def pack_experts(model) -> dict:
    """Replace the expert weights by random MXFP4 ones; returns the packed tensors by name."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = {}
    for key, value in model.named_parameters():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, out = value.shape
            blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
            scales = torch.randint(123, 126, (experts, out, width // 32), dtype=torch.uint8)
            with torch.no_grad():
                value.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    return packed


def save_packed(model, packed: dict, folder: Path) -> None:
    """A gpt_oss as it is published: the packed experts of `pack_experts` beside the other tensors."""
    state = {k: v for k, v in model.state_dict().items() if f"{k}_blocks" not in packed}
    save_file({**state, **packed}, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = {"quant_method": "mxfp4"}
    model.config.save_pretrained(folder)
