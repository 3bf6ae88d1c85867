"""Attention of the rows of a pass for MLX's CPU backend (``cpu.py``).

The stock one spends most of its time in the softmax's exponentials, and multiplies head by head where
query heads share a K/V head. Here those that share one are rows of one product, and the exponential is
a polynomial, squared a few times: about half of the time from a few rows on, compiled.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

# exp(y) - 1 = y P(y) for -1.5 <= y <= 0, by weighted least squares. From there to exp(16 y): twice
# (1 + q)^2 - 1 = q (q + 2), exact near 0, then twice the square, exact where little is left.
P = (0.99999994, 0.49999765, 0.1666428, 0.041573726, 0.0081568118, 0.001210972, 0.00010330645)
DOUBLINGS, SQUARES = 2, 2
LEAST = -24.0  # below, a weight is 4e-11 of the largest one and counts as 0
UNSEEN = -1e30  # the score of a key that a row does not see
SMALL = 384  # rows times keys from which on this is quicker


@partial(mx.compile, shapeless=True)
def fast_exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, absolute error 2e-7, relative 6e-6 down to -10; 0 below ``LEAST``."""
    y = mx.maximum(x, LEAST) * 0.5 ** (DOUBLINGS + SQUARES)
    p = P[-1]
    for c in P[-2::-1]:
        p = p * y + c
    q = p * y
    for _ in range(DOUBLINGS):
        q = q * (q + 2.0)
    e = q + 1.0
    for _ in range(SQUARES):
        e = e * e
    return mx.where(x > LEAST, e, 0.0)


def rows_attention(queries, keys, values, cache, scale, mask, sinks=None) -> mx.array:
    """As mlx-lm's ``scaled_dot_product_attention``: queries [B, H, R, D], keys and values [B, K, T, D].

    Only for what our passes ask: float32, a mask bool [B or 1, 1, R, T], no sinks. Anything else goes
    the stock way, and so do one row, which is to be plain decoding's arithmetic, and what is small.
    """
    stock = partial(scaled_dot_product_attention, queries, keys, values, cache, scale, mask, sinks)
    if sinks is not None or not isinstance(keys, mx.array) or queries.dtype != mx.float32:
        return stock()
    (B, H, R, _), (K, T) = queries.shape, keys.shape[1:3]
    if not isinstance(mask, mx.array) or mask.dtype != mx.bool_ or mask.shape[1:] != (1, R, T):
        return stock()
    if R == 1 or R * T < SMALL:
        return stock()
    shared = H // K * R
    scores = (scale * queries).reshape(B, K, shared, -1) @ keys.swapaxes(2, 3)
    scores = mx.where(mask, scores.reshape(B, H, R, T), UNSEEN)
    weights = fast_exp(scores - scores.max(axis=-1, keepdims=True)).reshape(B, K, shared, T)
    out = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return out.reshape(B, H, R, -1)
