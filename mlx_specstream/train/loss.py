"""The future n-gram loss (method Eq. 5), its targets, and what validation reports.

    L = alpha_0 L_0 + sum_j alpha_j L_j

L_0 is the main stream's next-token loss (shared mode only), L_j the mean loss of stream j over its
hosts. A stream's target is the token of the text, or (distillation) the main stream's own
distribution at the row that predicts this token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.projections import embedding_of
from ..model.seams import Seams
from .data import Batch
from .passes import Hidden, following, main_pass, run_batch

HEAD_ELEMENTS = 1 << 24  # logits held at once per chunk of the head (64 MB in fp32)


class Losses(NamedTuple):
    """Means of a batch, float32: of each stream [g], of the early exit [], of the main stream []."""

    streams: mx.array
    early_exit: mx.array
    main: mx.array


def stream_losses(seams: Seams, batch: Batch, target: str = "hard", main: bool = False) -> Losses:
    """The losses of a batch.

    Conditioned streams learn half from what they say alone, which chooses the guesses, and half from
    what they say given the token before, which ranks them; the first stream only from the latter.
    The early exit learns the next token (method 1.6); 0 if these streams have none.

    Args:
        target: ``"hard"``, cross-entropy with the text, or ``"distill"``, the Kullback-Leibler
            divergence from the main stream's own distribution, which gets no gradient from it.
        main: compute the main stream's loss, too; 0 otherwise.
    """
    hidden = run_batch(seams, batch)
    B, g, P = batch.targets.shape
    hosts, targets = mx.array(batch.hosts), mx.array(batch.targets.reshape(B, g * P))
    loss, labels, exit_labels = hard_loss, targets, following(mx.array(batch.tokens), hosts)
    if target == "distill":
        loss = soft_loss
        labels, exit_labels = (_main_at(hidden, hosts, ahead) for ahead in (range(1, g + 1), [0]))
    told = given_text(seams, hidden.streams, mx.array(batch.tokens), hosts)
    losses = head_losses(seams, loss, told, labels)
    if told is not hidden.streams and g > 1:
        alone = head_losses(seams, loss, hidden.streams[:, P:], labels[:, P:])
        losses = mx.concatenate([losses[:, :P], 0.5 * (losses[:, P:] + alone)], axis=1)
    losses = losses * (targets >= 0)
    sums = losses.reshape(B, g, P).sum(axis=(0, 2))
    losses = sums / mx.maximum((targets >= 0).reshape(B, g, P).sum(axis=(0, 2)), 1)
    early_exit = mx.array(0.0)
    if seams.streams.config.prune_rank:
        early_exit = _exit_loss(seams, batch, hidden, loss, exit_labels)
    return Losses(losses, early_exit, main_loss(seams, batch, hidden) if main else mx.array(0.0))


def exit_loss(seams: Seams, batch: Batch, target: str = "hard") -> mx.array:
    """The loss of the early exit alone [], as in ``stream_losses``; no stream runs for it."""
    hosts, passed = (
        mx.array(batch.hosts),
        main_pass(seams, mx.array(batch.tokens), batch.cut_hidden),
    )
    hidden = Hidden(passed.cut_hidden, passed.last_hidden, None)
    if target == "distill":
        return _exit_loss(seams, batch, hidden, soft_loss, _main_at(hidden, hosts, [0]))
    return _exit_loss(seams, batch, hidden, hard_loss, following(mx.array(batch.tokens), hosts))


def _exit_loss(seams: Seams, batch: Batch, hidden: Hidden, loss: Callable, labels) -> mx.array:
    rows = mx.stop_gradient(_at_hosts(hidden.cut, mx.array(batch.hosts)))
    used = mx.array(batch.targets[:, 0] >= 0)  # padding of hosts has no target
    losses = head_losses(seams, loss, seams.streams.exit_hidden(rows), labels) * used
    return losses.sum() / mx.maximum(used.sum(), 1)


def _at_hosts(cut_hidden: mx.array, hosts: mx.array) -> mx.array:
    """[B, L, E] -> [B, P, E]"""
    return mx.take_along_axis(cut_hidden, hosts[:, :, None], axis=1)


def main_loss(seams: Seams, batch: Batch, hidden: Hidden) -> mx.array:
    """Mean cross-entropy of the main stream over the completions, float32 []."""
    columns = np.flatnonzero((batch.labels >= 0).any(axis=0))
    some = slice(int(columns[0]), int(columns[-1]) + 1)  # prompts need no head
    labels = mx.array(batch.labels[:, some])
    losses = head_losses(seams, hard_loss, hidden.main[:, some], labels) * (labels >= 0)
    return losses.sum() / mx.maximum((labels >= 0).sum(), 1)


def head_losses(seams: Seams, loss: Callable, hidden: mx.array, labels: mx.array) -> mx.array:
    """Losses [B, r] of last hidden states [B, r, E] against labels [B, r] or [B, r, E].

    The head over a large vocabulary is the largest array of a step, so above ``HEAD_ELEMENTS`` logits
    it goes in chunks whose logits are made again for the gradient.
    """
    step = max(1, HEAD_ELEMENTS // (hidden.shape[0] * seams.vocabulary_size))
    if step >= hidden.shape[1]:  # small enough to keep
        return loss(seams, labels)(hidden)
    return mx.concatenate(
        [
            mx.checkpoint(loss(seams, labels[:, at : at + step]))(hidden[:, at : at + step])
            for at in range(0, hidden.shape[1], step)
        ],
        axis=1,
    )


def hard_loss(seams: Seams, targets: mx.array) -> Callable[[mx.array], mx.array]:
    """Hidden [B, r, E] -> cross-entropy [B, r] against targets [B, r] (-1 counts as 0)."""

    def loss(hidden):
        logits = seams.head(hidden).astype(mx.float32)
        return nn.losses.cross_entropy(logits, mx.maximum(targets, 0), reduction="none")

    return loss


def soft_loss(seams: Seams, teacher: mx.array) -> Callable[[mx.array], mx.array]:
    """Hidden [B, r, E] -> KL(teacher || student) [B, r] over the whole vocabulary.

    Args:
        teacher: last hidden states of the rows whose distributions are the target [B, r, E].
    """
    teacher = mx.stop_gradient(teacher)

    def logprobs(hidden):
        logits = seams.head(hidden).astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def loss(hidden):
        wanted = mx.stop_gradient(logprobs(teacher))
        return (mx.exp(wanted) * (wanted - logprobs(hidden))).sum(axis=-1)

    return loss


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
    at = _ahead(hosts, range(1, g + 1), tokens.shape[1])
    before = embedding_of(seams.model)(mx.take_along_axis(tokens, at, axis=1))
    by_stream = lambda x: x.reshape(B, g, P, -1).transpose(1, 0, 2, 3).reshape(g, B * P, -1)  # noqa: E731
    made = seams.streams.condition(by_stream(hidden), by_stream(before))
    return made.reshape(g, B, P, E).transpose(1, 0, 2, 3).reshape(B, g * P, E)


def _ahead(hosts: mx.array, ahead, length: int) -> mx.array:
    """Rows host + j for each j in ``ahead``, stream-major int32 [B, len(ahead) * P], none past the end."""
    rows = hosts[:, None] + mx.array(list(ahead))[None, :, None]
    return mx.minimum(rows, length - 1).reshape(hosts.shape[0], -1)


def _main_at(hidden: Hidden, hosts: mx.array, ahead) -> mx.array:
    """Last hidden states of the main rows host + j, [B, len(ahead) * P, E]."""
    rows = _ahead(hosts, ahead, hidden.main.shape[1])
    return mx.take_along_axis(hidden.main, rows[:, :, None], axis=1)


def evaluate(
    seams: Seams, batches: list[Batch], top_k: int, main: bool = False
) -> dict[str, list[float]]:
    """Validation loss, top-1 and top-k accuracy of each stream (given the token before, if they are
    conditioned on it), against the text whatever the training target was.

    Args:
        main: the main stream's loss, too.

    Returns:
        {"loss": [g], "top1": [g], "topk": [g]} over all valid targets; with ``main`` also
        {"main_loss": [1]} over all tokens of the completions; with an early exit also
        {"exit_loss": [1], "exit_top1": [1]} of the next token at the hosts.
    """
    g = seams.streams.config.num_streams
    total, loss, top1, topk = (np.zeros(g) for _ in range(4))
    main_total = main_sum = 0.0
    exits = np.zeros(3)  # loss, right, hosts
    for batch in batches:
        states, hosts = run_batch(seams, batch), mx.array(batch.hosts)
        hidden = given_text(seams, states.streams, mx.array(batch.tokens), hosts)
        B, _, P = batch.targets.shape
        targets = mx.array(batch.targets.reshape(B, g * P))
        nll, rank = _judged(seams, hidden, targets)
        valid = (targets >= 0).reshape(B, g, P)
        for sums, value in (
            (loss, nll),
            (top1, rank < 1),
            (topk, rank < top_k),
            (total, targets >= 0),
        ):
            sums += np.array((value.reshape(B, g, P) * valid).sum(axis=(0, 2)))
        if main:
            count = int((batch.labels >= 0).sum())
            main_sum += main_loss(seams, batch, states).item() * count
            main_total += count
        if seams.streams.config.prune_rank:
            rows = seams.streams.exit_hidden(_at_hosts(states.cut, hosts))
            nll, rank = _judged(seams, rows, following(mx.array(batch.tokens), hosts))
            used = valid[:, 0]
            exits += [((x * used).sum()).item() for x in (nll, rank < 1, mx.ones_like(nll))]
    total = np.maximum(total, 1)
    found = {
        "loss": (loss / total).tolist(),
        "top1": (top1 / total).tolist(),
        "topk": (topk / total).tolist(),
    }
    if main:
        found["main_loss"] = [main_sum / max(main_total, 1)]
    if seams.streams.config.prune_rank:
        hosts = max(exits[2], 1)
        found |= {"exit_loss": [exits[0] / hosts], "exit_top1": [exits[1] / hosts]}
    return found


def _judged(seams: Seams, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Of last states [B, r, E]: -log P(target) and how many tokens are likelier, both [B, r]."""
    logits = seams.head(hidden).astype(mx.float32)
    own = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)
    return mx.logsumexp(logits, axis=-1) - own[..., 0], (logits > own).sum(axis=-1)
