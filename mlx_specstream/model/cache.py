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
        most = self.keys.shape[2] - keys.shape[2]
        at = mx.clip(self.at, 0, most).reshape(1)
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


# True bounds the K/V of sliding-window layers. The decoding loop must read ``base`` first: it takes
# key i of a store for the one at position i.
WINDOWED = False


def make_prompt_cache(model) -> list[KVCache]:
    """A prompt cache for ``generate``: one ``KVCache`` per layer, which can take back rows.

    Sliding-window layers get a full one too (the window is in the mask), or with ``WINDOWED`` one
    that drops what nobody can see any more.
    """
    if not WINDOWED:
        return [KVCache() for _ in model.layers]
    return [WindowedKVCache(window) if window else KVCache() for window in window_of(model)]


def check_prompt_cache(cache: list, model) -> None:
    """Raise BadArgument if ``cache`` cannot hold a tree and drop parts of it again."""
    windows = window_of(model) if WINDOWED else [None] * len(model.layers)
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


class Buffers:
    """The K/V arrays of a prompt cache while a device-resident loop writes to them.

    MLX writes in place only into an array that nobody else holds, so the arrays are taken out of
    the caches, handed from pass to pass, and given back at the end.

    Attributes:
        keys, values: per layer [B, K, capacity, D].
        offset: position after the last row that is sure.
        bases: the different positions of key 0 (0 until a sliding window has slid), int32 [] each.
        base_of: per layer the index of its base.
    """

    def __init__(self, stores: list[KVCache]):
        self.stores = stores
        self.offset = stores[0].offset
        self._take()

    def _take(self) -> None:
        self.keys = [store.keys for store in self.stores]
        self.values = [store.values for store in self.stores]
        for store in self.stores:
            store.keys = store.values = None
        found = [getattr(store, "base", 0) for store in self.stores]
        distinct = sorted(set(found))
        self.bases = [mx.array(base, dtype=mx.int32) for base in distinct]
        self.base_of = tuple(distinct.index(base) for base in found)

    def give_back(self) -> None:
        """Hand the arrays to the caches again, with every row that is sure."""
        for store, k, v in zip(self.stores, self.keys, self.values, strict=True):
            store.keys, store.values, store.offset = k, v, self.offset
        self.keys = self.values = None

    def make_room(self, rows: int, round_up) -> tuple[int, ...]:
        """See to it that ``rows`` more rows fit; how many keys each layer's rows should look at.

        Args:
            round_up: the number of keys in the bucket of a length.
        """
        found = [getattr(store, "base", 0) for store in self.stores]
        needed = [self.offset - base + rows for base in found]
        if any(n > k.shape[2] for n, k in zip(needed, self.keys, strict=True)):
            self.give_back()
            for store in self.stores:
                if hasattr(store, "make_room"):
                    store.make_room(rows)
                else:
                    _grow(store, rows)
            self._take()
            return self.make_room(rows, round_up)
        return tuple(min(round_up(n), k.shape[2]) for n, k in zip(needed, self.keys, strict=True))


def _grow(store: KVCache, rows: int) -> None:
    """Lengthen a cache's arrays as mlx-lm does, by whole steps."""
    more = store.offset + rows - store.keys.shape[2]
    if more > 0:
        more = -(-more // store.step) * store.step
        widths = [(0, 0), (0, 0), (0, more), (0, 0)]
        store.keys, store.values = mx.pad(store.keys, widths), mx.pad(store.values, widths)
