"""trust: how far the probabilities that drafts report are to be believed. Plain Python."""

from __future__ import annotations

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
        return min(MOST_TRUST, _ratio(self._long))

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


def _scaled(pair: tuple[float, float], by: float) -> tuple[float, float]:
    return pair[0] * by, pair[1] * by


def _ratio(evidence: tuple[float, float], belief: float = BELIEF) -> float:
    promised, accepted = evidence
    return (accepted + belief) / (promised + belief)
