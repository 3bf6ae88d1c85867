"""Rope with one position per row, and the table that makes it cheap on MLX's CPU backend."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import rope_utils

ROPES = (
    nn.RoPE,
    rope_utils.Llama3RoPE,
    rope_utils.YarnRoPE,
    rope_utils.SuScaledRoPE,
    rope_utils.ProportionalRoPE,
)
TABLED = (nn.RoPE, rope_utils.Llama3RoPE)  # turn ``dims`` dimensions and scale none


def rope_rows(rope, x: mx.array, positions: mx.array) -> mx.array:
    """``rope`` (called with an offset per batch entry) on x [B, H, R, D], positions [B or 1, R]."""
    # mx.fast.rope takes one offset per batch entry, so each row becomes one.
    B, H, R, D = x.shape
    positions = mx.broadcast_to(positions, (B, R)).reshape(-1)
    rows = x.transpose(0, 2, 1, 3).reshape(B * R, H, 1, D)
    return rope(rows, positions).reshape(B, R, H, D).transpose(0, 2, 1, 3)


def has_table(rope: nn.Module, x: mx.array) -> bool:
    """Whether turning by a table is worth it: on a GPU the stock rope is one kernel."""
    cpu = mx.default_device().type == mx.DeviceType.cpu
    return cpu and isinstance(rope, TABLED) and x.dtype == mx.float32


def rope_table(rope, dims: int, traditional: bool, positions: mx.array):
    """Cosines and sines of ``rope`` at positions [B or 1, R], each [B or 1, 1, R, dims / 2].

    A rope is linear, so what it makes of unit vectors is its table. The stock rope computes it
    anew for queries and keys of every layer, which is a fifth of a pass of a small model.
    """
    half = mx.ones((dims // 2,)), mx.zeros((dims // 2,))
    unit = mx.stack(half, axis=-1).reshape(-1) if traditional else mx.concatenate(half)
    turned = rope_rows(rope, mx.broadcast_to(unit, (*positions.shape, dims))[:, None], positions)
    if traditional:
        turned = turned.reshape(*turned.shape[:-1], dims // 2, 2)
        return turned[..., 0], turned[..., 1]
    return turned[..., : dims // 2], turned[..., dims // 2 :]


def turn(x: mx.array, table: tuple[mx.array, mx.array], dims: int, traditional: bool) -> mx.array:
    """x [B, H, R, D] with its first ``dims`` dimensions turned by ``table``."""
    cos, sin = table
    if traditional:
        pairs = x[..., :dims].reshape(*x.shape[:-1], dims // 2, 2)
        re, im = pairs[..., 0], pairs[..., 1]
        turned = mx.stack([re * cos - im * sin, re * sin + im * cos], axis=-1)
        parts = [turned.reshape(*x.shape[:-1], dims)]
    else:
        re, im = x[..., : dims // 2], x[..., dims // 2 : dims]
        parts = [re * cos - im * sin, re * sin + im * cos]
    if dims < x.shape[-1]:
        parts.append(x[..., dims:])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def signature(rope: nn.Module) -> str:
    """Equal for ropes that turn alike."""
    plain = {k: v for k, v in vars(rope).items() if not k.startswith("_")}
    arrays = {k: v.tolist() for k, v in rope.items() if isinstance(v, mx.array)}
    return f"{type(rope).__name__} {sorted(plain.items())} {sorted(arrays.items())}"
