"""K/V of a sliding-window layer: a bounded buffer that can take rows back.

mlx-lm's ``RotatingKVCache`` overwrites its oldest row with every token, so the rows of a rejected
draft cannot be taken back, and a tree cannot lie behind the prefix. Here the rows stay in the order
of their positions, with room behind them; only when the buffer is full the rows that nobody can see
any more are dropped and the others slide to its front.

::

    key 0 (position base)                       offset
    | slack: may be taken back to | the window | room: at least step after a slide |
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache, RotatingKVCache

from ..errors import BadArgument

SLACK = 256  # rows
# What a model's mask asks for beyond the size of its own rotating cache: the mask is right.
ASKS_MORE = {"plamo3": 1}


class WindowedKVCache(KVCache):
    """A ``KVCache`` that keeps no more than ``window + slack + step`` rows.

    Attributes:
        window: as mlx-lm counts it: a row at position p sees keys at positions > p - window.
        slack: how many rows ``trim`` can always take back.
        step: room for new rows after a slide, and by how much the buffer grows before (class
            attribute, 256 as in mlx-lm).
        base: position of key 0 of the buffer; 0 until the buffer first slides.
        offset: position after the last row.
        keys, values: [B, K, cap, D] with rows [0, offset - base) in the order of their positions;
            None until the first row. cap is at most ``capacity``.
    """

    def __init__(self, window: int, slack: int = SLACK):
        super().__init__()
        if window < 1 or slack < 0:
            raise BadArgument(
                f"[window] must be at least 1 and slack at least 0; got {window} and {slack}."
            )
        self.window, self.slack = window, slack
        self.base = 0

    @property
    def capacity(self) -> int:
        """The most rows that the buffer ever has."""
        return self.window + self.slack + self.step

    @property
    def stored(self) -> int:
        """Rows in the buffer."""
        return self.offset - self.base

    @property
    def reach(self) -> int:
        """How many stored rows ``update_and_fetch`` returns before the new ones."""
        return min(self.stored, self.window - 1)

    @property
    def rollback(self) -> int:
        """How many rows ``trim`` can take back now: the row after them must see its whole window."""
        return self.stored - self.window if self.base else self.stored

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add K/V [B, K, N, D]; return those that the new rows can see [B, K, reach + N, D].

        ``reach`` is that of before the call, as ``make_mask(N)`` takes it. Any N will do: of more
        rows than the buffer holds all are returned and the last ones kept.
        """
        new, before = keys.shape[2], self.reach
        if self.stored + new > self.capacity and new > self.capacity - self.window:
            return self._pass_through(keys, values)
        if self.keys is None:
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
        self._make_room(new)
        at = self.stored
        end = at + new
        self.offset += new
        self.keys[..., at:end, :] = keys
        self.values[..., at:end, :] = values
        return self.keys[..., at - before : end, :], self.values[..., at - before : end, :]

    def _pass_through(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As ``update_and_fetch``, for more rows than a slide makes room for."""
        if self.reach:
            seen = slice(self.stored - self.reach, self.stored)
            keys = mx.concatenate([self.keys[..., seen, :], keys], axis=2)
            values = mx.concatenate([self.values[..., seen, :], values], axis=2)
        self._keep_last(keys, values, self.offset + keys.shape[2] - self.reach)
        return keys, values

    def _keep_last(self, keys: mx.array, values: mx.array, offset: int) -> None:
        """Hold the last of these rows [B, K, n, D], which end before position ``offset``."""
        drop = max(keys.shape[2] - self.window - self.slack, 0)
        self.keys = _slid(keys, drop, self.capacity)
        self.values = _slid(values, drop, self.capacity)
        self.offset, self.base = offset, offset - keys.shape[2] + drop

    def make_room(self, rows: int) -> bool:
        """Make sure that ``rows`` rows fit behind ``offset``: grow the buffer, or slide.

        Rows behind ``offset`` (of a pass whose outcome the host does not know yet) keep their
        positions too. Afterwards ``keys`` and ``values`` may be other arrays, and longer ones.

        Returns:
            Whether the buffer slid, which changes ``base``. An empty cache has no buffer to grow
            (its shape is not known): False.

        Raises:
            BadArgument: ``rows`` is more than ``step + slack``: a full buffer could not take them.
        """
        if rows > self.capacity - self.window:
            raise BadArgument(
                f"[window] a sliding-window layer takes at most {self.capacity - self.window} "
                f"rows at a time, got {rows}; use a smaller tree or a cache with more slack."
            )
        return self.keys is not None and self._make_room(rows)

    def _make_room(self, rows: int) -> bool:
        need, have = self.stored + rows, self.keys.shape[2]
        if need <= have:
            return False
        drop = 0
        if need > self.capacity:
            drop = self.stored - min(self.window + self.slack, self.capacity - rows)
        size = min(-(-need // self.step) * self.step, self.capacity)
        self.keys, self.values = _slid(self.keys, drop, size), _slid(self.values, drop, size)
        self.base += drop
        return drop > 0

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        """The mask of N new rows over the keys that ``update_and_fetch`` will return.

        Args:
            window_size: what the model asks for; None means ``window``.
            return_array: never "causal". One row that sees all keys has no mask even so, as in
                mlx-lm.

        Returns:
            bool [N, reach + N], "causal", or None.

        Raises:
            BadArgument: the model asks for more than ``window``; some of that is not there.
        """
        window = self.window if window_size is None else window_size
        if window > self.window:
            raise BadArgument(
                f"[window] the model asks for a window of {window} tokens, but this cache was made "
                f"for {self.window}; make it with mlx_specstream.make_prompt_cache(model)."
            )
        fits = self.reach + N <= window
        if N == 1 and fits:
            return None
        if fits and not return_array:
            return "causal"
        return create_causal_mask(N, self.reach, window_size=window)

    def is_trimmable(self) -> bool:
        """True: a few rows can always be taken back. ``can_trim`` says it for a number of rows."""
        return True

    def trim(self, n: int) -> int:
        """Take back the last n rows (or all there are); returns how many.

        Raises:
            BadArgument: rows that would then be in the window are gone (n > ``rollback``). Nothing
                has changed; going on with less than n would give wrong text.
        """
        n = min(self.offset, n)
        if n == self.offset:
            self.base = 0
        elif n > self.rollback:
            raise BadArgument(
                f"[prompt_cache] a sliding-window layer can take back {self.rollback} tokens now, "
                f"not {n}; make a new cache."
            )
        self.offset -= n
        return n

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All rows that are stored [B, K, offset - base, D]; their first position is ``base``."""
        return self.keys[..., : self.stored, :], self.values[..., : self.stored, :]

    def size(self) -> int:
        return self.stored

    @property
    def state(self):
        return self.keys, self.values, self.offset, self.base, self.window, self.slack

    @state.setter
    def state(self, v):
        self.keys, self.values, self.offset, self.base, self.window, self.slack = v

    def to_quantized(self, group_size: int = 64, bits: int = 4):
        raise NotImplementedError("WindowedKVCache cannot be quantised")

    @classmethod
    def from_rotating(cls, cache: RotatingKVCache, slack: int = SLACK) -> WindowedKVCache:
        """The same rows in a cache of ours; ``cache`` stays as it is.

        A rotating cache that has wrapped holds the window and no more, so rows can be taken back
        only once new ones have come.

        Raises:
            BadArgument: the cache always keeps its first tokens, which is no plain window.
        """
        if cache.keep:
            raise BadArgument(
                f"[prompt_cache] a RotatingKVCache that keeps its first {cache.keep} tokens is no "
                "sliding window; make it with mlx_specstream.make_prompt_cache(model)."
            )
        made = cls(cache.max_size, slack)
        if not cache.empty():
            keys, values = (_in_order(x, cache._idx, cache.offset) for x in cache.state[:2])
            made._keep_last(keys, values, cache.offset)
        return made

    def to_rotating(self) -> RotatingKVCache:
        """mlx-lm's own cache with the rows of the window: for files that mlx-lm alone can load."""
        made = RotatingKVCache(max_size=self.window)
        if not self.empty():
            rows = slice(max(self.stored - self.window, 0), self.stored)
            made.keys = mx.contiguous(self.keys[..., rows, :])
            made.values = mx.contiguous(self.values[..., rows, :])
            made.offset, made._idx = self.offset, made.keys.shape[2]
        return made

    @classmethod
    def merge(cls, caches: list[WindowedKVCache]) -> BatchRotatingKVCache:
        return BatchRotatingKVCache.merge([c.to_rotating() for c in caches])


# ``load_prompt_cache`` looks classes up by name among mlx-lm's own.
mlx_lm_cache.WindowedKVCache = WindowedKVCache


def window_of(model) -> list[int | None]:
    """The sliding window of each layer in tokens, None where there is none.

    From the caches that the model itself would make: a rotating one that keeps no first tokens.
    """
    if not hasattr(model, "make_cache"):
        return [None] * len(model.layers)
    more = ASKS_MORE.get(getattr(model, "model_type", None), 0)
    return [
        c.max_size + more if isinstance(c, RotatingKVCache) and not c.keep else None
        for c in model.make_cache()
    ]


def can_trim(stores: list, rows: int) -> bool:
    """Whether every layer can take back its last ``rows`` rows.

    mlx-lm's ``can_trim_prompt_cache`` does not ask how many.
    """
    return all(s.is_trimmable() and getattr(s, "rollback", s.offset) >= rows for s in stores)


def _slid(rows: mx.array, drop: int, size: int) -> mx.array:
    """Rows [B, K, n, D] without the first ``drop``, in a new buffer [B, K, size, D]."""
    B, K, n, D = rows.shape
    room = mx.zeros((B, K, size - n + drop, D), dtype=rows.dtype)
    return mx.concatenate([rows[..., drop:, :], room], axis=2)


def _in_order(rows: mx.array, idx: int, offset: int) -> mx.array:
    """Rows of a rotating buffer that goes on at ``idx``, in the order of their positions."""
    if idx == rows.shape[2]:
        return rows
    if idx < offset:  # it has wrapped: what lies behind idx is older
        return mx.concatenate([rows[..., idx:, :], rows[..., :idx, :]], axis=2)
    return rows[..., :idx, :]
