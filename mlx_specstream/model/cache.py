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

    def commit(self, path: list[int]) -> None:
        """Keep the K/V of the rows in ``path`` (indices into this pass's rows), drop all others."""
        keys, values = self.fresh
        self.store.trim(keys.shape[2])
        if path == list(range(len(path))):  # they lie where they belong
            self.store.offset += len(path)
        elif path:
            at = mx.array(path)
            self.store.update_and_fetch(keys[:, :, at], values[:, :, at])

    def drop(self) -> None:
        """Drop the K/V of this pass (streams are never stored)."""
        self.commit([])


class NoStore:
    """No prefix and nothing kept: a pass over whole sequences."""

    offset = 0

    def update_and_fetch(self, keys, values):
        return keys, values


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
    """A prompt cache for ``generate``: one growing ``KVCache`` per layer.

    Sliding-window layers get one too (the window is in the mask): a rotating buffer cannot take
    back the rows of a rejected draft.
    """
    return [KVCache() for _ in model.layers]


def check_prompt_cache(cache: list, model) -> None:
    """Raise BadArgument if ``cache`` cannot hold a tree and drop parts of it again."""
    kinds = sorted({type(c).__name__ for c in cache})
    if len(cache) != len(model.layers) or any(type(c) is not KVCache for c in cache):
        raise BadArgument(
            f"[prompt_cache] streams need one KVCache per layer ({len(model.layers)}), got "
            f"{len(cache)} of {', '.join(kinds)}; make it with "
            "mlx_specstream.make_prompt_cache(model) or pass use_streams=False."
        )
