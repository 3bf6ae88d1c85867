"""draft: the streams' guesses, and a text copied from the context, become one token tree.

Array code without a host read. A node is the path of tokens that leads to it; best-first drafting
scores every path that could be in the tree and keeps the likeliest. A copied text competes in the
same tree: where it agrees with the guesses it raises their probability, where it does not it adds
a branch of its own, which may be longer than there are streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .tree import Tree, TreeShape

LEAST = -20.0  # log-probability below which one guess is as good as another
DEAD = -1e4  # added to that of a node which is no node
BLOCK = 32  # tokens of a block in the search for the likeliest


class Guesses(NamedTuple):
    """The likeliest tokens of each stream, most probable first.

    Shapes: tokens int32 [g, K]; logprobs float32 [g, K], or [g, K, K] where a guess depends on the
    one before it: [j, a, b] is that of guess b of stream j below guess a of stream j - 1 (below the
    root, which is known, all a are alike).
    """

    tokens: mx.array
    logprobs: mx.array


class CopiedText(NamedTuple):
    """A copied continuation; slots behind its end hold token -1.

    Shapes: tokens int32 [C]; logprobs float32 [2, C]: log P(right | those before are right), and
    log(1 - P).
    """

    tokens: mx.array
    logprobs: mx.array

    @classmethod
    def of(cls, tokens: list[int], logprobs: list[float], slots: int) -> CopiedText:
        """Of fixed size, so that the length of a text does not make a new trace; may be empty."""
        n = min(slots, len(tokens))
        said = np.full(slots, -1, np.int32)
        right = np.full((2, slots), LEAST, np.float32)
        said[:n] = tokens[:n]
        right[0, :n] = np.minimum(logprobs[:n], -1e-4)
        right[1, :n] = np.log(-np.expm1(right[0, :n]))
        return cls(mx.array(said), mx.array(right))


def guesses_from(
    logits: mx.array, count: int, vocabulary: mx.array | None = None, normal: bool = False
) -> Guesses:
    """The ``count`` likeliest tokens of each stream; logits [g, V].

    The probabilities are those among the blocks of tokens that hold the likeliest ones: without an
    exponential of all V, which costs more than the search. They overstate a little, in the same
    way every time; the planner's running calibration takes that out.

    Args:
        vocabulary: token ids of the columns, int32 [V], where the head gave only some.
        normal: these are log-probabilities already.
    """
    logits = logits.astype(mx.float32)
    g, V = logits.shape
    ids = None
    if count < V // BLOCK:
        if V % BLOCK:
            logits = mx.pad(logits, [(0, 0), (0, -V % BLOCK)], constant_values=-mx.inf)
        blocks = logits.reshape(g, -1, BLOCK)
        best = mx.argsort(-blocks.max(axis=-1), axis=-1)[:, :count]  # [g, count]
        logits = mx.take_along_axis(blocks, best[:, :, None], axis=1).reshape(g, -1)
        ids = (best[:, :, None] * BLOCK + mx.arange(BLOCK)).reshape(g, -1)
        ids = mx.minimum(ids, V - 1)  # where even real tokens have -inf, padding may be chosen, too
    top = mx.argsort(-logits, axis=-1)[:, :count]
    tokens = top if ids is None else mx.take_along_axis(ids, top, axis=-1)
    logprobs = mx.take_along_axis(logits, top, axis=-1)
    if not normal:
        logprobs = logprobs - mx.logsumexp(logits, axis=-1, keepdims=True)
    if vocabulary is not None:
        tokens = vocabulary[tokens]
    return Guesses(tokens.astype(mx.int32), logprobs)


def conditioned(logprobs: mx.array, change: mx.array) -> mx.array:
    """Log-probabilities given the token before. [g, K] -> [g, K, K]

    Args:
        logprobs: of the guesses, whatever stands before them.
        change: what the token before adds to their logits, [g, K, K]. The rest of the vocabulary is
            taken as unchanged.
    """
    said = mx.minimum(mx.exp(logprobs).sum(axis=-1), 1 - 1e-6)
    rest = mx.log1p(-said)[:, None, None]
    moved = logprobs[:, None] + change
    return moved - mx.logaddexp(mx.logsumexp(moved, axis=-1, keepdims=True), rest)


def padded(guesses: Guesses, streams: int) -> Guesses:
    """Guesses of so many streams, the added ones as unlikely as can be; tokens of a stream differ."""
    g, K = guesses.tokens.shape
    if g == streams:
        return guesses
    tokens = mx.broadcast_to(mx.arange(K, dtype=mx.int32), (streams - g, K))
    logprobs = mx.full((streams - g, *guesses.logprobs.shape[1:]), LEAST)
    return Guesses(
        mx.concatenate([guesses.tokens, tokens]), mx.concatenate([guesses.logprobs, logprobs])
    )


def draft(
    root: mx.array,
    guesses: Guesses | None,
    copied: CopiedText | None,
    shape: TreeShape,
    nodes: int | None = None,
) -> Tree:
    """A tree of ``nodes`` nodes below ``root`` (int32 scalar); depth d holds guesses of stream d.

    Args:
        guesses: None (nothing known yet) leaves the copied text alone.
        nodes: how many; None: all that the shape names.
    """
    paths, logprobs, depth, is_copy = _candidates(guesses, copied, shape, mx)
    if nodes is not None and nodes < len(depth):
        # Ties go to the earlier one, and a parent always stands before its children.
        order = mx.argsort(mx.arange(len(depth)) * 1e-5 - logprobs)
        keep = mx.sort(order[:nodes])
        paths, depth, is_copy = paths[keep], mx.array(depth)[keep], mx.array(is_copy)[keep]
    else:
        depth, is_copy = mx.array(depth), mx.array(is_copy)
    return _tree(root, paths, depth, is_copy)


@dataclass(frozen=True)
class Promises:
    """What a draft's candidate nodes promise, on the host.

    Shapes: paths int32 [A, D] (-1 behind the end), logprobs float32 [A], depth int32 [A].
    """

    paths: np.ndarray
    logprobs: np.ndarray
    depth: np.ndarray

    @classmethod
    def of(cls, guesses: Guesses | None, copied: CopiedText | None, shape: TreeShape) -> Promises:
        """Waits for the guesses if they are still on their way."""
        guesses = None if guesses is None else Guesses(*map(np.array, guesses))
        copied = None if copied is None else CopiedText(*map(np.array, copied))
        return cls(*_candidates(guesses, copied, shape, np)[:3])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of the nodes below the root to be accepted, most likely first, float32 [S]."""
        return np.sort(np.exp(self.logprobs[self.depth > 0]))[::-1]

    def ranks(self, accepted: list[int]) -> list[int]:
        """Places in ``probabilities`` of the nodes along a path of tokens, 0 for the likeliest."""
        below, found = self.logprobs[self.depth > 0], []
        for depth in range(1, len(accepted) + 1):
            here = (self.depth == depth) & (self.paths[:, :depth] == accepted[:depth]).all(axis=1)
            if not here.any():
                break
            found.append(int((below > self.logprobs[here].max()).sum()))
        return found


def size_of(guesses: Guesses | None, copied: CopiedText | None, shape: TreeShape) -> int:
    """How many candidate nodes there are at most, root included."""
    below = 0 if guesses is None else len(shape.ranks(*guesses.tokens.shape)) - 1
    return 1 + below + (0 if copied is None else copied.tokens.shape[0])


def _candidates(guesses, copied, shape: TreeShape, xp):
    """Every path that may be a node: paths [A, D] (-1 behind the end), log-probabilities [A].

    ``xp`` is mlx.core or numpy. Also, always NumPy: depth int32 [A], copied bool [A].
    """
    C = 0 if copied is None else copied.tokens.shape[0]
    nothing = np.full((1, 0), -1, np.int32)
    ranks = nothing if guesses is None else shape.ranks(*guesses.tokens.shape)
    S, g = ranks.shape
    D = max(g, C)
    depth = (ranks >= 0).sum(axis=1).astype(np.int32)
    exists = xp.array(ranks >= 0)
    if g:
        tokens, edges = _along(guesses, np.maximum(ranks, 0), xp)
        paths = xp.where(exists, tokens, -1)  # [S, g]
        edges = xp.maximum(edges, LEAST)
    else:
        paths = edges = xp.zeros((S, 0))
        paths = paths.astype(xp.int32)
    if not C:
        return paths, xp.where(exists, edges, 0.0).sum(axis=1), depth, np.zeros(S, bool)

    both = min(g, C)
    level = np.arange(1, both + 1, dtype=np.int32)
    text = copied.tokens[None, :both]
    same = paths[:, :both] == text
    along = xp.cumprod(same.astype(xp.int32), axis=1) > 0  # the path is the text up to this depth
    before = xp.concatenate([xp.ones((S, 1), dtype=along.dtype), along[:, : both - 1]], axis=1)
    p, other = copied.logprobs[:, None, :both]
    old = edges[:, :both]
    mixed = xp.where(same, xp.maximum(old, p), old + other)
    mixed = xp.where(before[:, :both] & (text >= 0), mixed, old)
    edges = xp.concatenate([mixed, edges[:, both:]], axis=1)
    logprobs = xp.where(exists, edges, 0.0).sum(axis=1)
    # How many of the copied text's own nodes candidates already stand for.
    known = xp.where(along & xp.array(depth[:, None] == level), xp.array(level), 0)
    agreed = known.max() if both else 0
    own = np.arange(1, C + 1, dtype=np.int32)
    score = xp.cumsum(xp.maximum(copied.logprobs[0], LEAST), axis=0)
    dead = (xp.array(own) <= agreed) | (copied.tokens < 0)
    score = xp.where(dead, score + DEAD, score)
    tail = xp.where(xp.array(own[None] <= own[:, None]), copied.tokens[None], -1)  # [C, C]
    paths = xp.concatenate([_widen(paths, D, xp), _widen(tail, D, xp)], axis=0)
    logprobs = xp.concatenate([logprobs, score])
    return paths, logprobs, np.concatenate([depth, own]), np.arange(S + C) >= S


def _along(guesses: Guesses, ranks: np.ndarray, xp):
    """The token and the log-probability at every step of paths of ranks [S, g]; both [S, g]."""
    g, K = guesses.tokens.shape
    column = (np.arange(g) * K).astype(np.int32)
    if guesses.logprobs.ndim == 2:
        at = xp.array((column + ranks).astype(np.int32))
        return guesses.tokens.reshape(-1)[at], guesses.logprobs.reshape(-1)[at]
    # Which guess a rank means depends on the guess before it, so level by level. Widths and offsets are
    # arrays: a number would be part of a kernel, and every K and level have one of their own.
    order = xp.argsort(-guesses.logprobs, axis=-1).astype(xp.int32).reshape(-1)  # [g * K * K]
    guess, edge = [xp.zeros(ranks.shape[:1], dtype=xp.int32)], []
    width = xp.array(np.full(len(ranks), K, np.int32))
    for level in range(g):
        row = guess[-1] * width + xp.array(np.full(len(ranks), level * K * K, np.int32))
        guess.append(order[row + xp.array(ranks[:, level].astype(np.int32))])
        edge.append(row + guess[-1])
    tokens = guesses.tokens.reshape(-1)[xp.stack(guess[1:], axis=1) + xp.array(column)]
    return tokens, guesses.logprobs.reshape(-1)[xp.stack(edge, axis=1)]


def _widen(paths, width: int, xp):
    more = xp.full((paths.shape[0], width - paths.shape[1]), -1)
    return xp.concatenate([paths, more.astype(paths.dtype)], axis=1) if more.size else paths


def _tree(root: mx.array, paths: mx.array, depth: mx.array, is_copy: mx.array) -> Tree:
    """Relations of the chosen paths [n, D], root first, parents before children."""
    D = paths.shape[1]
    if D == 0:
        zero = mx.zeros((1,), mx.int32)
        return Tree(root.reshape(1), zero, zero, mx.ones((1, 1), mx.bool_), is_copy)
    level = mx.arange(D)
    # k is an ancestor of i if its path is the beginning of i's.
    same = (paths[:, None] == paths[None]) | (level >= depth[:, None])[None]  # [n, n, D]
    ancestors = same.all(axis=-1) & (depth[None] <= depth[:, None])
    # A copied text may say what a guess says already: of equal nodes all count as the first.
    n = mx.arange(paths.shape[0])
    twins = ancestors & (depth[None] == depth[:, None])
    first = mx.argmax(twins, axis=-1) == n
    ancestors = ancestors & ((first[None] & ~twins) | (n[:, None] == n[None]))
    above = ancestors & (depth[None] == depth[:, None] - 1)
    last = mx.take_along_axis(paths, mx.maximum(depth - 1, 0)[:, None], axis=1)[:, 0]
    tokens = mx.where(depth == 0, root, mx.maximum(last, 0))
    parents = mx.argmax(above, axis=-1)
    return Tree(
        tokens.astype(mx.int32),
        parents.astype(mx.int32),
        depth.astype(mx.int32),
        ancestors,
        is_copy,
    )
