"""What a stock forward makes of positions besides its rope: learned tables, scaled queries.

Both read the cache's `offset` once per batch entry. In a pass every row has its own position, which
only the rows know.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

TABLES = ("wpe",)  # attributes of stock models that hold a table of learned positions


def positions_of(cache, length: int) -> mx.array:
    """The positions of `length` tokens behind `cache`, int32 [B or 1, L].

    An offset with two axes is one of our passes: already one position per row.
    """
    offset = mx.array(0 if cache is None else cache.offset)
    if offset.ndim == 2:
        return offset
    return offset.reshape(-1, 1) + mx.arange(length)[None]


def tables_of(model: nn.Module) -> list[nn.Module]:
    """The stock tables of learned positions of a model."""
    return [m for path, m in model.named_modules() if path.rpartition(".")[2] in TABLES]


def in_table(table: nn.Module, positions: mx.array) -> mx.array:
    """Positions that `table` has a row for; nodes beyond its end are never part of a text."""
    return mx.minimum(positions, table.weight.shape[0] - 1)


def query_scale(layer: nn.Module, positions: mx.array, dtype: mx.Dtype) -> mx.array:
    """Llama 4's scale of queries at positions [B or 1, R], as ministral3 has it: [B or 1, 1, R, 1].

    1 + beta log(1 + floor(position / original context)).
    """
    attention = layer.self_attn
    turns = mx.floor(positions / attention.original_max_position_embeddings)
    scale = 1 + attention.scaling_beta * mx.log(1 + turns)
    return scale[:, None, :, None].astype(dtype)
