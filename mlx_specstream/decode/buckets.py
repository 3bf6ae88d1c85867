"""Compiled halves of a step, one trace per bucket of shapes.

A trace costs tens of milliseconds (and on a Linux CPU, the first time a machine meets a fused
kernel, a run of the C++ compiler), so there are few: the keys that rows may look at are rounded up,
and old traces go. Where MLX cannot compile, it runs the plain function instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import mlx.core as mx

MOST = 128  # traces kept


def round_up(length: int) -> int:
    """The number of keys in the bucket of ``length``: few buckets, little waste."""
    step = 128 if length <= 1024 else 512 if length <= 8192 else 1024
    return -(-length // step) * step


class Buckets:
    """Compiled functions by the shapes that they were traced for."""

    def __init__(self):
        self._made: OrderedDict[Hashable, Callable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._made

    def get(self, key: Hashable, make: Callable[[], Callable], compiled: bool = True) -> Callable:
        """The function of ``key``; ``make()`` gives it plain."""
        if key not in self._made:
            function = make()
            self._made[key] = mx.compile(function) if compiled else function
            while len(self._made) > MOST:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def clear(self) -> None:
        self._made.clear()
