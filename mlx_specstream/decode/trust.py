"""trust: how far the probabilities that drafts report are to be believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Accepted tokens, as promised, that a draft's own word counts for before any are checked.
BELIEF = 4.0
SHORT_MEMORY = 0.75  # what a checked draft still counts one draft later: some four drafts
BREAK = 0.4  # ratio of the short memory over that of the long one at which the text has changed
MOST_TRUST = 1.25  # drafts may be a little better than they say


class Trust:
    """How many of the drafted tokens that drafts promised were accepted, recent ones first.

    Two memories: the short one tells when the long one is about another text.

    Args:
        memory: what a checked draft still counts after ``fade()``, 0..1.
    """

    def __init__(self, memory: float):
        self.memory = memory
        self._long = self._short = self._last = 0.0, 0.0  # promised, accepted

    @property
    def ratio(self) -> float:
        """Expected over promised tokens, 0..MOST_TRUST; begins at 1."""
        return min(MOST_TRUST, _ratio(self.evidence))

    @property
    def evidence(self) -> tuple[float, float]:
        """Tokens promised and accepted, the recent ones in full."""
        return self._long

    def fade(self, times: int = 1) -> None:
        """Let what is known count less, before the next draft is added."""
        self._long = _scaled(self._long, self.memory**times)
        self._short = _scaled(self._short, SHORT_MEMORY**times)

    def add(self, promised: float, accepted: float) -> None:
        """A draft was checked: the sum of its nodes' probabilities, and its accepted tokens."""
        self._last = promised, accepted
        self._long = self._long[0] + promised, self._long[1] + accepted
        self._short = self._short[0] + promised, self._short[1] + accepted
        long, short = _ratio(self._long), _ratio(self._short)
        if short < long and _ratio(self._short, belief=1.0) < BREAK * long:
            self._long = self._short

    def restart(self) -> None:
        """Forget all but the last draft."""
        self._long = self._short = self._last


class TrustBySize:
    """The same for the likeliest nodes of a draft, for several numbers of them.

    The likeliest nodes keep their promises better than the rest, so the ratio of a large tree says too
    little of a small one, and the other way round. What a size lacks in evidence it takes over from the
    next smaller one.

    Args:
        memory: of ``Trust``.
        sizes: rows of the trees, ascending; the first is the root alone.
    """

    def __init__(self, memory: float, sizes: Sequence[int]):
        self.sizes = sizes
        self._each = [Trust(memory) for _ in sizes[1:]]
        self._ratios: np.ndarray | None = None

    @property
    def ratios(self) -> np.ndarray:
        """Expected over promised tokens for each of ``sizes``, float64."""
        if self._ratios is None:
            ratios, promised, accepted = [1.0], 0.0, 0.0
            for trust in self._each:
                own = trust.evidence
                lacks = max(0.0, 1.0 - own[0] / promised) if promised else 0.0
                promised, accepted = own[0] + lacks * promised, own[1] + lacks * accepted
                ratios.append(min(MOST_TRUST, _ratio((promised, accepted))))
            self._ratios = np.array(ratios)
        return self._ratios

    def fade(self, times: int = 1) -> None:
        for trust in self._each:
            trust.fade(times)
        self._ratios = None

    def add(self, nodes: int, promised: np.ndarray, ranks: Sequence[int]) -> None:
        """A draft was checked.

        Args:
            nodes: how many rows it had; fewer than the smallest size count as that.
            promised: sums of the probabilities of the likeliest nodes, for each of ``sizes``.
            ranks: of the accepted nodes in the order of probability, 0 for the likeliest.
        """
        for size, sum_, trust in zip(self.sizes[1:], promised[1:], self._each, strict=True):
            if size > max(nodes, self.sizes[1]):
                break
            trust.add(float(sum_), sum(rank < size - 1 for rank in ranks))
        self._ratios = None

    def restart(self) -> None:
        for trust in self._each:
            trust.restart()
        self._ratios = None


def _scaled(pair: tuple[float, float], by: float) -> tuple[float, float]:
    return pair[0] * by, pair[1] * by


def _ratio(evidence: tuple[float, float], belief: float = BELIEF) -> float:
    promised, accepted = evidence
    return (accepted + belief) / (promised + belief)
