"""Which rows a pass feeds, where they sit and what they see.

A *row* is one position fed to the model: a node of a tree (or a token of a prompt), or a stream of
one. Rows lie on the token axis as ``[main nodes | stream 1 of each node | ... | stream gamma of
each node]``. Nothing here knows a model.

Glossary: B batch, n main nodes, g streams (gamma), R = n + g * n rows, T cached (prefix) keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx


@dataclass(frozen=True)
class Rows:
    """A set of rows.

    Args:
        positions: rope position of each row, int32 [B or 1, R].
        sees: which rows of this pass a row attends to, bool [B or 1, R, R] (first axis: batch).
        main: how many of the rows are main nodes; the rest are streams.
        stream_of: stream number j of each stream row, 1..g, int32 [R - main].
        prefix_sees: which prefix keys a row attends to, bool [B or 1, R, T]; None means all.
    """

    positions: mx.array
    sees: mx.array
    main: int
    stream_of: mx.array | None = None
    prefix_sees: mx.array | None = None

    @property
    def count(self) -> int:
        return self.positions.shape[1]

    def take(self, keep: mx.array) -> Rows:
        """The rows named by ``keep`` (int32 [m]); main rows only (pruning comes before streams)."""
        assert self.main == self.count, "rows are pruned before streams are added"
        return replace(
            self,
            positions=self.positions[:, keep],
            sees=self.sees[:, keep][:, :, keep],
            main=keep.size,
            prefix_sees=None if self.prefix_sees is None else self.prefix_sees[:, keep],
        )

    def mask(self, prefix: int, window: int | None) -> mx.array:
        """The attention mask of these rows, bool [B or 1, 1, R, prefix + R].

        Args:
            prefix: how many keys come before this pass's own; key i sits at position i.
            window: sliding window in tokens as mlx-lm counts it (a row at position p sees keys at
                positions > p - window), or None.
        """
        where = mx.arange(prefix)
        seen = self.prefix_sees
        if seen is None:
            seen = mx.ones((1, self.count, prefix), dtype=mx.bool_)
        sees = self.sees
        if window is not None:
            here = self.positions[:, :, None]
            seen = seen & (here < where[None, None] + window)
            sees = sees & (here < self.positions[:, None, :] + window)
        batch = max(seen.shape[0], sees.shape[0])
        seen = mx.broadcast_to(seen, (batch, *seen.shape[1:]))
        sees = mx.broadcast_to(sees, (batch, *sees.shape[1:]))
        return mx.concatenate([seen, sees], axis=-1)[:, None]  # [B, 1, R, T + R]

    def mask_in_place(self, at: mx.array, base, length: int, window: int | None) -> mx.array:
        """The mask where these rows lie among their own keys, bool [B or 1, 1, R, length].

        Args:
            at: index of the first of these rows' keys, int32 []; all keys before it are the prefix,
                those behind the rows are of no one.
            base: position of key 0.
            length: how many keys there are.
            window: as in ``mask``.
        """
        where = mx.arange(length)
        seen = mx.broadcast_to((where < at)[None, None], (1, self.count, length))
        sees = self.sees
        if window is not None:
            here = self.positions[:, :, None]
            seen = seen & (here < base + where[None, None] + window)
            sees = sees & (here < self.positions[:, None, :] + window)
        at = clamped(at, length - self.count)
        return mx.slice_update(seen, sees, at, axes=(2,))[:, None]


def clamped(at: mx.array, most: int) -> mx.array:
    """``at`` (int32 []) within 0..most, int32 [1]: where MLX may write without leaving an array.

    ``most`` is of two elements because a single number becomes part of a kernel's code: then every pair
    of sizes would have a kernel of its own to be compiled.
    """
    return mx.maximum(mx.minimum(at, _twice(most)), 0)[:1]


@lru_cache(maxsize=256)
def _twice(number: int) -> mx.array:
    """The same array for the same number, so that a trace holds one clamp for all layers."""
    return mx.array([number, number], dtype=mx.int32)


def causal_rows(start: int | mx.array, length: int) -> Rows:
    """``length`` ordinary tokens at positions start, start + 1, .. (int or int32 [])."""
    where = mx.arange(length, dtype=mx.int32)
    return Rows(
        positions=(start + where).astype(mx.int32)[None],
        sees=(where[:, None] >= where[None])[None],
        main=length,
    )


def tree_rows(start: int | mx.array, depth: mx.array, ancestors: mx.array) -> Rows:
    """The nodes of a token tree whose root sits at position ``start``.

    Args:
        start: int or int32 [].
        depth: depth of each node, int32 [n]; the root has 0.
        ancestors: ancestors[i, k] is True if k is i or an ancestor of i, bool [n, n].
    """
    depth, ancestors = mx.array(depth), mx.array(ancestors)
    return Rows(
        positions=(start + depth).astype(mx.int32)[None],
        sees=ancestors[None],
        main=depth.size,
    )


def with_streams(rows: Rows, *, num_streams: int, at_host: bool, main_sees_streams: bool) -> Rows:
    """``rows`` with ``num_streams`` streams beside every main row (inline placement).

    Stream j of a node sees all that its node sees and streams 1..j of the same node (Eq. 2). With
    ``main_sees_streams`` a node also sees its own streams ([P] Eq. 1), else not (V1 Eq. 1).

    Args:
        at_host: a stream has its node's rope position t; else t + j.
    """
    n, g = rows.main, num_streams
    own = mx.eye(n, dtype=mx.bool_)[None]  # [1, n, n]
    none = mx.zeros((1, n, n), dtype=mx.bool_)
    top = [rows.sees, *[own if main_sees_streams else none] * g]
    blocks = [mx.concatenate(_same_batch(top), axis=-1)]
    for j in range(1, g + 1):
        row = [rows.sees, *[own] * j, *[none] * (g - j)]
        blocks.append(mx.concatenate(_same_batch(row), axis=-1))
    shift = [
        mx.zeros_like(rows.positions) if at_host else mx.full(rows.positions.shape, j)
        for j in range(1, g + 1)
    ]
    positions = [rows.positions] + [rows.positions + s.astype(mx.int32) for s in shift]
    seen = rows.prefix_sees
    return Rows(
        positions=mx.concatenate(positions, axis=1),
        sees=mx.concatenate(blocks, axis=1),
        main=n,
        stream_of=mx.repeat(mx.arange(1, g + 1), n),
        prefix_sees=None if seen is None else mx.concatenate([seen] * (1 + g), axis=1),
    )


def stream_rows(*, hosts: mx.array, num_streams: int, at_host: bool, prefix: int | None) -> Rows:
    """Only the streams of some main rows whose keys are already in the prefix (deferred placement).

    Args:
        hosts: position t of each host row, int32 [B, P]; key t of the prefix is the host's own.
        prefix: how many prefix keys there are if hosts do not see all of them; None if every host
            sees the whole prefix (decoding: the host is its last key).

    Returns:
        Rows [B, g * P], stream-major: stream 1 of each host, then stream 2 of each host, ...
    """
    P = hosts.shape[1]
    g = num_streams
    of = mx.repeat(mx.arange(1, g + 1), P)  # [g * P]
    host = mx.tile(mx.arange(P), g)
    positions = mx.tile(hosts, (1, g))
    prefix_sees = None
    if prefix is not None:
        prefix_sees = positions[:, :, None] >= mx.arange(prefix)[None, None]  # [B, g * P, T]
    sees = (host[:, None] == host[None]) & (of[:, None] >= of[None])
    if not at_host:
        positions = positions + of[None]
    return Rows(
        positions=positions.astype(mx.int32),
        sees=sees[None],
        main=0,
        stream_of=of,
        prefix_sees=prefix_sees,
    )


def _same_batch(blocks: list[mx.array]) -> list[mx.array]:
    batch = max(b.shape[0] for b in blocks)
    return [mx.broadcast_to(b, (batch, *b.shape[1:])) for b in blocks]
