"""sizes: which sizes of a pass a planner weighs: few, because a pass is compiled once per size."""

from __future__ import annotations

import numpy as np

MOST_SIZES = 3  # besides the root alone
WORTH_A_SIZE = 0.003  # tokens a pass, averaged over typical drafts; less is not worth another size
RATES = (
    0.3,
    0.45,
    0.6,
    0.7,
    0.8,
    0.9,
    0.97,
)  # how likely the first guess of a typical draft is right
PRICES = (1.0, 1.4, 1.8)  # tokens that a plain token's time may be worth


def shortlist(
    sizes: tuple[int, ...], passes: np.ndarray, behind: np.ndarray, streams: int, copies: bool
) -> tuple[int, ...]:
    """At most MOST_SIZES of ``sizes``: those that lose least over a range of typical drafts.

    Args:
        sizes: ascending, each above 1.
        passes, behind: what a pass of one node and of each size costs, and the streams behind it, in
            plain tokens, float [sizes + 1].
        streams: gamma; 0: there are none.
        copies: drafts may be copied text alone.
    """
    if len(sizes) <= MOST_SIZES:
        return sizes
    rows, worth = np.array((1, *sizes)), []  # tokens less the price of their time
    for rate in RATES:
        drafts = [(_tree_promises(rate, streams), behind)] if streams else []
        if copies or not drafts:
            drafts.append((rate ** np.arange(1, rows[-1]), 0.0))
        for promises, more in drafts:
            sums = np.concatenate([[0.0], np.cumsum(promises)])
            tokens = 1.0 + sums[np.minimum(rows - 1, len(sums) - 1)]
            worth += [tokens - price * (passes + more) for price in PRICES]
    worth = np.stack(worth)  # [draft and price, sizes + 1]
    taken = [0]
    while len(taken) <= MOST_SIZES:
        best = [worth[:, [*taken, i]].max(axis=1).mean() for i in range(len(rows))]
        if len(taken) > 1 and max(best) - worth[:, taken].max(axis=1).mean() < WORTH_A_SIZE:
            break
        taken.append(int(np.argmax(best[1:])) + 1)
    return tuple(sorted({sizes[i - 1] for i in taken[1:]}))


def _tree_promises(rate: float, depth: int) -> np.ndarray:
    """Nodes of a tree whose streams give their first guess ``rate``, the next half of the rest ..."""
    guesses = np.array([rate, (1 - rate) / 2, (1 - rate) / 4])
    level, found = np.ones(1), []
    for _ in range(depth):
        level = np.sort(np.outer(level, guesses).reshape(-1))[::-1][:64]
        found.append(level)
    return np.sort(np.concatenate(found))[::-1]
