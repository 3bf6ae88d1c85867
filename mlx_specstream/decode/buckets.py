"""Compiled halves of a step, one trace per bucket of shapes.

A trace costs about as much as it saves in its first call, so the keys that rows may look at are rounded
up, a bucket is compiled when it is met again, and old traces go. Where MLX cannot compile, it runs the
plain function instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import mlx.core as mx

MOST = 128  # traces kept
WORTH = 1  # calls after which a trace has cost as much as it would have saved


def round_up(length: int) -> int:
    """The number of keys in the bucket of ``length``: few buckets, little waste."""
    step = 128 if length <= 1024 else 512 if length <= 8192 else 1024
    return -(-length // step) * step


class Buckets:
    """Compiled functions by the shapes that they were traced for.

    Args:
        worth: calls of a bucket before it is compiled.
    """

    def __init__(self, worth: int = WORTH):
        self.worth = worth
        self._made: OrderedDict[Hashable, Callable] = OrderedDict()
        self._calls: OrderedDict[Hashable, int] = OrderedDict()  # of those that are not compiled

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._made

    def get(self, key: Hashable, make: Callable[[], Callable], compiled: bool = True) -> Callable:
        """The function of ``key``; ``make()`` gives it plain."""
        if key not in self._made:
            calls = self._calls.pop(key, 0)
            if not compiled or calls < self.worth:
                self._calls[key] = calls + 1
                if len(self._calls) > 8 * MOST:
                    self._calls.popitem(last=False)
                return make()
            self._made[key] = mx.compile(make())
            if len(self._made) > MOST:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def clear(self) -> None:
        self._made.clear()
        self._calls.clear()
