"""Temperatures that make the streams' probabilities right on average.

Best-first drafting and the planner compare probabilities of different streams. One number per stream,
what its logits are divided by, takes out most of what training left over- or underconfident (Guo et
al. 2017, "On Calibration of Modern Neural Networks", section 4.2). Ranks within a stream stay.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..model.seams import Seams
from .data import Batch
from .loss import given_text
from .passes import run_batch

WIDEST = 4.0  # temperatures lie in 1 / WIDEST .. WIDEST
ROUNDS, NEAR = 12, 1e-3  # of Newton's method at most, and the change of 1 / T at which it ends


def fit_temperatures(seams: Seams, batches: list[Batch]) -> tuple[np.ndarray, dict]:
    """The temperature of each stream with the smallest -log P(text) over ``batches``.

    With b = 1 / T, logits l and target y the loss is the mean of log sum exp(b l) - b l_y: convex in b,
    with the derivatives E[l] - l_y and Var[l] under softmax(b l). A stream without any target keeps 1.

    Returns:
        float32 [g]; {"loss": [g], "calibrated_loss": [g]} at temperature 1 and at these.
    """
    g = seams.streams.config.num_streams
    kept = [(_last_hidden(seams, batch), batch.targets) for batch in batches]
    inverse, losses = np.ones(g), []
    for _ in range(ROUNDS):
        loss, slope, curve = (np.zeros(g) for _ in range(3))
        for hidden, targets in kept:
            for sums, found in zip(
                (loss, slope, curve), _at(seams, hidden, targets, inverse), strict=True
            ):
                sums += found
        losses.append(loss)
        step = np.divide(slope, curve, out=np.zeros(g), where=curve > 0)
        before, inverse = inverse, np.clip(inverse - step, inverse / 2, 2 * inverse)
        inverse = np.clip(inverse, 1 / WIDEST, WIDEST)
        if np.abs(inverse - before).max() < NEAR:
            break
    count = np.maximum(sum((t >= 0).sum(axis=(0, 2)) for _, t in kept), 1)
    about = {
        "loss": (losses[0] / count).tolist(),
        "calibrated_loss": (losses[-1] / count).tolist(),
    }
    return (1 / inverse).astype(np.float32), about


def _last_hidden(seams: Seams, batch: Batch) -> mx.array:
    """[B, g * P, E], given the token before if the streams are conditioned on it."""
    tokens, hosts = mx.array(batch.tokens), mx.array(batch.hosts)
    hidden = given_text(seams, run_batch(seams, batch).streams, tokens, hosts)
    mx.eval(hidden)
    return hidden


def _at(seams: Seams, hidden: mx.array, targets: np.ndarray, inverse: np.ndarray):
    """Sums over the targets of a batch [B, g, P] of loss and its two derivatives, each [g]."""
    B, g, P = targets.shape
    logits = seams.head(hidden).astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)
    labels = mx.array(np.maximum(targets, 0).reshape(B, g * P, 1))
    own = mx.take_along_axis(logits, labels, axis=-1)[..., 0]
    b = mx.repeat(mx.array(inverse.astype(np.float32)), P)  # [g * P]
    p = mx.exp(b[:, None] * logits)  # the largest is 1
    norm = p.sum(axis=-1)
    mean, square = ((p * x).sum(axis=-1) / norm for x in (logits, logits * logits))
    loss = mx.log(norm) - b * own
    valid = mx.array(targets >= 0)
    for value in (loss, mean - own, square - mean * mean):
        yield np.array((value.reshape(B, g, P) * valid).sum(axis=(0, 2)), np.float64)
