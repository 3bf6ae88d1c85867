"""OPT in mlx-lm's conventions: the paper's base, which mlx-lm lacks.

Zhang et al., "OPT: Open Pre-trained Transformer Language Models", arXiv 2205.01068; checked against
transformers' `OPTForCausalLM`. The 350m differs from its sisters: norms come after the residual sums,
there is no last norm, and token embeddings are narrower than the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from ..errors import BadCheckpoint
from .positions import positions_of

SPARE = 2  # rows of the position table before the one of position 0
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "silu": nn.silu,
}


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str = "opt"
    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size
        if self.hidden_size % self.num_attention_heads:
            raise BadCheckpoint(
                f"config.json: 'hidden_size' {self.hidden_size} must be a multiple of "
                f"'num_attention_heads' {self.num_attention_heads}"
            )
        if self.activation_function not in ACTIVATIONS:
            raise BadCheckpoint(
                f"config.json: 'activation_function' must be one of {', '.join(ACTIVATIONS)} but "
                f"is {self.activation_function!r}"
            )


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.num_attention_heads
        linear = partial(nn.Linear, args.hidden_size, args.hidden_size, bias=args.enable_bias)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))
        self.scale = (args.hidden_size // self.n_heads) ** -0.5

    def __call__(self, x: mx.array, mask=None, cache: Any = None) -> mx.array:
        B, L, E = x.shape
        queries, keys, values = (
            projection(x).reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, L, D]
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.out_proj(output.transpose(0, 2, 1, 3).reshape(B, L, E))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        norm = partial(nn.LayerNorm, args.hidden_size, affine=args.layer_norm_elementwise_affine)
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = norm()
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.final_layer_norm = norm()
        self.norm_first = args.do_layer_norm_before
        self.activation = ACTIVATIONS[args.activation_function]

    def __call__(self, x: mx.array, mask=None, cache: Any = None) -> mx.array:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.mlp(x))

    def mlp(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class PositionTable(nn.Module):
    """Learned positions. No `nn.Embedding`, so that quantisation leaves it alone: it is small."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = mx.zeros((count + SPARE, width))

    def __call__(self, positions: mx.array) -> mx.array:
        """int32 [B or 1, L] -> [B or 1, L, E]; beyond the table, its last row."""
        return self.weight[mx.minimum(positions + SPARE, self.weight.shape[0] - 1)]


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        width, narrow = args.hidden_size, args.word_embed_proj_dim
        self.embed_tokens = nn.Embedding(args.vocab_size, narrow)
        self.embed_positions = PositionTable(args.max_position_embeddings, width)
        if narrow != width:
            self.project_in = nn.Linear(narrow, width, bias=False)
            self.project_out = nn.Linear(width, narrow, bias=False)
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(width, affine=args.layer_norm_elementwise_affine)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]

    def __call__(self, inputs: mx.array, cache=None, input_embeddings=None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if "project_in" in self:
            h = self.project_in(h)
        cache = cache or [None] * len(self.layers)
        h = h + self.embed_positions(positions_of(cache[0], h.shape[1]))
        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c)
        if "final_layer_norm" in self:
            h = self.final_layer_norm(h)
        return self.project_out(h) if "project_out" in self else h


class Backbone(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.decoder = Decoder(args)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.word_embed_proj_dim, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache=None, input_embeddings=None) -> mx.array:
        """Tokens int32 [B, L] -> logits [B, L, V]"""
        h = self.model.decoder(inputs, cache, input_embeddings)
        return (
            self.lm_head(h) if "lm_head" in self else self.model.decoder.embed_tokens.as_linear(h)
        )

    @property
    def layers(self):
        return self.model.decoder.layers

    def sanitize(self, weights: dict) -> dict:
        # Checkpoints of 2022 hold the bare decoder, a version counter, and tied weights twice.
        named = {f"model.{k}" if k.startswith("decoder.") else k: v for k, v in weights.items()}
        named.pop("model.decoder.version", None)
        if self.args.tie_word_embeddings:
            named.pop("lm_head.weight", None)
        return named
