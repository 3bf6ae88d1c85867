"""What each stock layer gets as its ``cache`` during one of our passes, and where its K/V live.

A decoding pass appends the rows of the whole tree to mlx-lm's own ``KVCache``; ``commit`` then
keeps the accepted path and drops the rest. Because the storage is mlx-lm's, a prompt cache made
here or there works in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..errors import BadArgument
from .rows import clamped
from .window import WindowedKVCache, window_of


@dataclass(frozen=True)
class MaskRequest:
    """Stands in for a mask while the stock loop runs; the layer gate makes that of its own rows.

    The stock loop builds one mask per kind of layer before the first layer. Once rows are pruned or
    added its size is wrong, but which kind a layer asked for (its window) is just what we need.
    """

    window: int | None


class LayerContext:
    """The ``cache`` of one layer in one pass: positions, K/V of prefix and rows, mask kind."""

    def __init__(self, run, store):
        self.run = run
        self.store = store
        self.fresh: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> mx.array:
        """Rope position of every row, int32 [B or 1, R]; two axes tell the rope seam: no batch."""
        return self.run.rows.positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add this pass's K/V [B, K, R, D]; return those of prefix and pass [B, K, T + R, D]."""
        values = self.run.stream_values(values)
        self.fresh = keys, values
        return self.store.update_and_fetch(keys, values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        return MaskRequest(window_size)

    def drop(self) -> None:
        """Take this pass's K/V out of the store again."""
        self.store.trim(self.fresh[0].shape[2])


class NoStore:
    """No prefix and nothing kept: a pass over whole sequences."""

    offset = 0

    def update_and_fetch(self, keys, values):
        return keys, values


class RowStore:
    """One layer's K/V buffer inside a traced pass: written first, then read up to a fixed length.

    In this order the buffer has no reader when it is written, so MLX writes in place; nothing is
    copied, however large the buffer is. ``at`` is an array, so one trace serves all offsets.

    Args:
        keys, values: [B, K, capacity, D]; ``at + rows`` must not exceed the capacity (a write
            outside it would corrupt memory, so the place is clamped).
        at: index of the first row to write, int32 []; the rows before it are the prefix.
        base: position of key 0 (more than 0 once a sliding window has slid), int32 [] or int.
        length: how many keys a row may look at; static, at least ``at`` + rows.
    """

    def __init__(self, keys: mx.array, values: mx.array, at: mx.array, base, length: int):
        self.keys, self.values = keys, values
        self.at, self.base, self.length = at, base, length

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Put rows [B, K, R, D] at ``at``."""
        at = clamped(self.at, self.keys.shape[2] - keys.shape[2])
        self.keys = mx.slice_update(self.keys, keys.astype(self.keys.dtype), at, axes=(2,))
        self.values = mx.slice_update(self.values, values.astype(self.values.dtype), at, axes=(2,))

    def update_and_fetch(self, keys, values):
        self.write(keys, values)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class FixedPrefix:
    """A prefix [B, K, T, D] that later rows attend to and that is never extended."""

    def __init__(self, keys: mx.array, values: mx.array):
        self.keys, self.values = keys, values
        self.offset = keys.shape[2]

    def update_and_fetch(self, keys, values):
        return (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )


def make_prompt_cache(model) -> list[KVCache]:
    """A prompt cache for ``generate``: one ``KVCache`` per layer, which can take back rows.

    Sliding-window layers get one that drops what nobody can see any more.
    """
    return [WindowedKVCache(window) if window else KVCache() for window in window_of(model)]


def check_prompt_cache(cache: list, model) -> None:
    """Raise BadArgument if ``cache`` cannot hold a tree and drop parts of it again."""
    windows = window_of(model)
    fits = len(cache) == len(windows) and all(
        type(c) is KVCache or (type(c) is WindowedKVCache and c.window == window)
        for c, window in zip(cache, windows, strict=True)
    )
    if not fits:
        kinds = sorted({type(c).__name__ for c in cache})
        raise BadArgument(
            f"[prompt_cache] streams need one KVCache per layer ({len(windows)}), got "
            f"{len(cache)} of {', '.join(kinds)}; make it with "
            "mlx_specstream.make_prompt_cache(model) or pass use_streams=False."
        )
