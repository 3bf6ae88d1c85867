"""The future n-gram loss (method Eq. 5) in lossless mode: base frozen, alpha_0 = 0.

The base runs once over the sequences without gradient; then only stream rows run through the MSA
layers, attending to the keys and values that the base left there. That is the deferred placement of
decoding with many hosts at once.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.cache import FixedPrefix, NoStore
from ..model.projections import embedding_of
from ..model.rows import causal_rows
from ..model.seams import Pass, Seams
from .data import Batch

HEAD_ELEMENTS = 1 << 24  # logits held at once per chunk of the head (64 MB in fp32)


def base_pass(seams: Seams, tokens: mx.array) -> tuple[mx.array, list]:
    """Run the frozen base over tokens [B, L].

    Returns:
        M^{N-Ns} [B, L, E], and per layer where its K/V lie (MSA layers) or nothing.
    """
    run = Pass(causal_rows(0, tokens.shape[1]), take=slice(0, 1))
    seams.forward(run, tokens)
    stores = [
        FixedPrefix(*context.fresh) if index >= seams.cut else NoStore()
        for index, context in enumerate(run.contexts)
    ]
    return run.cut_hidden, stores


def stream_hidden(seams: Seams, cut_hidden: mx.array, stores: list, hosts: mx.array) -> mx.array:
    """Last hidden states of the streams of ``hosts`` [B, P] -> [B, g * P, E], stream-major."""
    at_hosts = mx.take_along_axis(cut_hidden, hosts[:, :, None], axis=1)  # [B, P, E]
    run = seams.run_streams(at_hosts, hosts, stores, prefix=cut_hidden.shape[1])
    return run.last_hidden


def given_text(seams: Seams, hidden: mx.array, tokens: mx.array, hosts: mx.array) -> mx.array:
    """Last states of streams, corrected by the token that the text has before their target.

    As they are, if these streams have no such correction.

    Args:
        hidden: of ``stream_hidden`` [B, g * P, E]; tokens: int32 [B, L]; hosts: int32 [B, P].
    """
    config = seams.streams.config
    if not config.condition_rank:
        return hidden
    (B, P), g, E = hosts.shape, config.num_streams, hidden.shape[-1]
    at = hosts[None] + mx.arange(1, g + 1)[:, None, None]  # [g, B, P]
    at = mx.minimum(at, tokens.shape[1] - 1).transpose(1, 0, 2).reshape(B, g * P)
    before = embedding_of(seams.model)(mx.take_along_axis(tokens, at, axis=1))
    by_stream = lambda x: x.reshape(B, g, P, E).transpose(1, 0, 2, 3).reshape(g, B * P, E)  # noqa: E731
    made = seams.streams.condition(by_stream(hidden), by_stream(before))
    return made.reshape(g, B, P, E).transpose(1, 0, 2, 3).reshape(B, g * P, E)


def stream_losses(seams: Seams, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy of each stream over its valid targets, float32 [g], and of the early exit.

    Conditioned streams learn half from what they say alone, which chooses the guesses, and half from
    what they say given the token before, which ranks them; the first stream only from the latter.
    The early exit learns the next token (method 1.6); 0 if these streams have none.
    """
    cut_hidden, stores = base_pass(seams, mx.array(batch.tokens))
    cut_hidden = mx.stop_gradient(cut_hidden)
    hosts = mx.array(batch.hosts)
    hidden = stream_hidden(seams, cut_hidden, stores, hosts)
    B, g, P = batch.targets.shape
    targets = mx.array(batch.targets.reshape(B, g * P))
    # The head over a large vocabulary is the largest array of a step, so it goes in chunks whose
    # logits are made again for the gradient.
    step = max(1, HEAD_ELEMENTS // (B * seams.vocabulary_size))

    def head_losses(hidden, begin=0):
        return mx.concatenate(
            [
                _head_loss(seams, targets[:, at : at + step])(hidden[:, at : at + step])
                for at in range(begin, g * P, step)
            ],
            axis=1,
        )

    told = given_text(seams, hidden, mx.array(batch.tokens), hosts)
    losses = head_losses(told)
    if told is not hidden and g > 1:
        both = 0.5 * (losses[:, P:] + head_losses(hidden, begin=P))
        losses = mx.concatenate([losses[:, :P], both], axis=1)
    losses = losses * (targets >= 0)
    sums = losses.reshape(B, g, P).sum(axis=(0, 2))
    losses = sums / mx.maximum((targets >= 0).reshape(B, g, P).sum(axis=(0, 2)), 1)
    if not seams.streams.config.prune_rank:
        return losses, mx.array(0.0)
    at_hosts = mx.take_along_axis(cut_hidden, hosts[:, :, None], axis=1)
    following = mx.take_along_axis(mx.array(batch.tokens), hosts + 1, axis=1)
    used = targets[:, :P] >= 0  # padding of hosts has no target
    exit_losses = _head_loss(seams, following)(seams.streams.exit_hidden(at_hosts)) * used
    return losses, exit_losses.sum() / mx.maximum(used.sum(), 1)


def _head_loss(seams: Seams, targets: mx.array):
    """Hidden [B, r, E] -> cross-entropy [B, r] against targets [B, r] (-1 counts as 0)."""

    def loss(hidden):
        logits = seams.head(hidden).astype(mx.float32)
        return nn.losses.cross_entropy(logits, mx.maximum(targets, 0), reduction="none")

    return mx.checkpoint(loss)


def evaluate(seams: Seams, batches: list[Batch], top_k: int) -> dict[str, list[float]]:
    """Validation loss, top-1 and top-k accuracy of each stream (given the token before, if they are
    conditioned on it).

    Returns:
        {"loss": [g], "top1": [g], "topk": [g]} over all valid targets.
    """
    g = seams.streams.config.num_streams
    total, loss, top1, topk = (np.zeros(g) for _ in range(4))
    for batch in batches:
        cut_hidden, stores = base_pass(seams, mx.array(batch.tokens))
        hosts = mx.array(batch.hosts)
        hidden = stream_hidden(seams, cut_hidden, stores, hosts)
        hidden = given_text(seams, hidden, mx.array(batch.tokens), hosts)
        B, _, P = batch.targets.shape
        logits = seams.head(hidden).astype(mx.float32)
        targets = mx.array(batch.targets.reshape(B, g * P))
        own = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)
        rank = (logits > own).sum(axis=-1)
        nll = mx.logsumexp(logits, axis=-1) - own[..., 0]
        valid = (targets >= 0).reshape(B, g, P)
        for sums, value in (
            (loss, nll),
            (top1, rank < 1),
            (topk, rank < top_k),
            (total, targets >= 0),
        ):
            sums += np.array((value.reshape(B, g, P) * valid).sum(axis=(0, 2)))
    total = np.maximum(total, 1)
    return {
        "loss": (loss / total).tolist(),
        "top1": (top1 / total).tolist(),
        "topk": (topk / total).tolist(),
    }
