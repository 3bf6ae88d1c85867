"""The projections of a stock layer under the names that ``StreamConfig.lora_targets`` uses."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import mlx.nn as nn

from ..config import StreamConfig
from ..errors import UnsupportedModel
from .positions import TABLES

# Names in mlx-lm that differ from ours: attribute -> our name.
ALIASES = {
    **{"dense": "o_proj", "fc1": "up_proj", "fc2": "down_proj"},  # phi
    **{"c_fc": "up_proj", "c_proj": "down_proj"},  # starcoder2, gpt2
    "out_proj": "o_proj",  # opt
    # internlm2; its wqkv interleaves heads, so it has no column blocks and gets no LoRA
    **{"wo": "o_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
}
OWNED = {"attn.c_proj": "o_proj"}  # gpt2: where the owner tells it apart
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *ALIASES)
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),  # gpt2
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Projection:
    """One linear map of a layer, as one or more blocks of columns (several where it is fused).

    Args:
        layer: index among the MSA layers, lowest is 0.
        names: our name of each block.
        keys: the name of each block's LoRA, unique in the layer; None for a block without.
        sizes: columns of each block; they sum to the output size.
        d_in: input size.
        experts: True for the experts of a mixture (one LoRA shared by all of them).
    """

    layer: int
    names: tuple[str, ...]
    keys: tuple[str | None, ...]
    sizes: tuple[int, ...]
    d_in: int
    experts: bool

    def only(self, targets: Collection[str]) -> Projection:
        """With LoRA on the blocks named in ``targets`` alone."""
        keys = (k if n in targets else None for n, k in zip(self.names, self.keys, strict=True))
        return replace(self, keys=tuple(keys))


def projections_of(layer: nn.Module, index: int) -> Iterator[tuple[nn.Module, Projection]]:
    """The projections of a layer, each with the stock module that computes it."""
    taken: set[str] = set()
    for path, module in sorted(layer.named_modules()):
        owner, _, name = path.rpartition(".")
        if name in FUSED:
            names = FUSED[name]
        elif name in PLAIN:
            own = ".".join(path.split(".")[-2:])
            names = (OWNED.get(own) or ALIASES.get(name, name),)
        else:
            continue
        shape = weight_shape(getattr(module, "linear", module))  # mlx-lm's LoRA wraps the linear
        d_out, d_in = shape[-2:]
        sizes = (d_out,)
        if name == "gate_up_proj":
            sizes = (d_out // 2, d_out // 2)
        elif name == "c_attn":
            if d_out != 3 * d_in:  # one K/V head for all: another model's layout
                continue
            sizes = (d_in, d_in, d_in)
        elif name == "qkv_proj":
            attention = layer
            for part in owner.split("."):
                attention = attention[part]
            kv = attention.n_kv_heads * attention.head_dim
            sizes = (d_out - 2 * kv, kv, kv)
        # Shared experts beside routed ones repeat names; the owner's name tells them apart.
        unique = (n if n not in taken else f"{owner.rpartition('.')[2]}_{n}" for n in names)
        keys = tuple(unique)
        taken.update(keys)
        yield module, Projection(index, names, keys, sizes, d_in, len(shape) == 3)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight as if it were not quantised."""
    *lead, last = module.weight.shape
    return *lead, last * 32 // module.bits if hasattr(module, "bits") else last


def hidden_size(model: nn.Module) -> int:
    """E, the width of the hidden states: the embedding's, unless the model projects that (OPT-350m)."""
    own = weight_shape(embedding_of(model))[1]
    enters = {
        projection.d_in
        for _, projection in projections_of(model.layers[-1], 0)
        if {"q_proj", "up_proj", "gate_proj"} & set(projection.names)
    }
    return own if own in enters or len(enters) != 1 else enters.pop()


def embedding_of(model: nn.Module) -> nn.Module:
    """The token embedding [V, E]: the first in the model, quantised or inside mlx-lm's LoRA."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TABLES:  # of positions
            continue
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            return module
    raise UnsupportedModel(
        "[model] no token embedding found; only language models can have streams."
    )


def stream_shapes(model: nn.Module, config: StreamConfig) -> list[dict[str, tuple[int, int]]]:
    """(d_in, d_out) of every projection that gets LoRA, per MSA layer, lowest first."""
    shapes = []
    for index, layer in enumerate(model.layers[-config.msa_layers :]):
        shapes.append(
            {
                key: (projection.d_in, size)
                for _, projection in projections_of(layer, index)
                for key, size in zip(
                    projection.only(config.lora_targets).keys, projection.sizes, strict=True
                )
                if key
            }
        )
    return shapes
