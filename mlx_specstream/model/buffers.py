"""The K/V arrays of a prompt cache while a device-resident loop writes to them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from .window import WindowedKVCache


class Buffers:
    """K/V arrays, taken out of their caches until ``give_back``.

    MLX writes in place only into an array that nobody else holds, so the arrays are handed from
    pass to pass, and the caches hold none meanwhile.

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
        found = [_base(store) for store in self.stores]
        distinct = sorted(set(found))
        self.bases = [mx.array(base, dtype=mx.int32) for base in distinct]
        self.base_of = tuple(distinct.index(base) for base in found)

    def give_back(self) -> None:
        """Hand the arrays to the caches again, with every row that is sure."""
        for store, k, v in zip(self.stores, self.keys, self.values, strict=True):
            store.keys, store.values, store.offset = k, v, self.offset
        self.keys = self.values = None

    def make_room(self, rows: int, round_up: Callable[[int], int]) -> tuple[int, ...]:
        """See to it that ``rows`` more rows fit; how many keys each layer's rows should look at.

        Args:
            round_up: the number of keys in the bucket of a length.
        """
        if any(n > k.shape[2] for n, k in zip(self._needed(rows), self.keys, strict=True)):
            self.give_back()
            for store in self.stores:
                if isinstance(store, WindowedKVCache):
                    store.make_room(rows)
                else:
                    _grow(store, rows)
            self._take()
        needed = self._needed(rows)
        return tuple(min(round_up(n), k.shape[2]) for n, k in zip(needed, self.keys, strict=True))

    def _needed(self, rows: int) -> list[int]:
        return [self.offset - _base(store) + rows for store in self.stores]


def _base(store: KVCache) -> int:
    return getattr(store, "base", 0)


def _grow(store: KVCache, rows: int) -> None:
    """Lengthen a cache's arrays as mlx-lm does, by whole steps."""
    more = store.offset + rows - store.keys.shape[2]
    if more > 0:
        more = -(-more // store.step) * store.step
        widths = [(0, 0), (0, 0), (0, more), (0, 0)]
        store.keys, store.values = mx.pad(store.keys, widths), mx.pad(store.values, widths)
