"""Conditioned drafts: what a stream guesses, given the token that stands before its guess.

Streams guess side by side. The first one's predecessor is the root, known when streams run; that of
a later one is a guess of the stream before it, and there are K of those. So the first stream is
corrected before the head, and for the others the head scores only their own K guesses again, below
each guess of the stream before: a few small products, whatever the vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from .projections import embedding_of
from .seams import Seams


def below_root(seams: Seams, hidden: mx.array, root: mx.array) -> mx.array:
    """Last hidden states of one host's streams [1, g, E], the first one corrected by ``root``.

    Args:
        root: the token that was chosen before the first stream's guess, int32 [].
    """
    condition = seams.streams.condition
    before = embedding_of(seams.model)(root.reshape(1, 1))  # [1, 1, E]
    return mx.concatenate([condition(hidden[:, :1], before), hidden[:, 1:]], axis=1)


def change_below(seams: Seams, hidden: mx.array, tokens: mx.array) -> mx.array:
    """What the guess before adds to the logits of each guess, float32 [g, K, K].

    Entry [j, a, b] is for guess b of stream j below guess a of stream j - 1; nothing for the first
    stream, which ``below_root`` has corrected.

    Args:
        hidden: last hidden states of one host's streams [1, g, E].
        tokens: their guesses, int32 [g, K].
    """
    g, K = tokens.shape
    nothing = mx.zeros((1, K, K))
    if g == 1:
        return nothing
    alone = hidden[0, 1:, None]  # [g - 1, 1, E]
    before = embedding_of(seams.model)(tokens[:-1])  # [g - 1, K, E]
    rows = mx.concatenate([alone, seams.streams.condition(alone, before, first=1)], axis=1)
    logits = seams.head_rows(rows.reshape(1, (g - 1) * (K + 1), -1), tokens[1:].reshape(-1))
    logits = logits.astype(mx.float32).reshape(g - 1, K + 1, g - 1, K)
    own = mx.arange(g - 1)
    logits = logits[own, :, own]  # of its own guesses alone [g - 1, K + 1, K]
    return mx.concatenate([nothing, logits[:, 1:] - logits[:, :1]], axis=0)
