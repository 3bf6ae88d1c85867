"""gammas: how many of the streams draft the next tree, all of them or the first few.

Deep guesses are worth their rows where text is easy, and hardly ever reached where it is not. What a draft
of all streams would have been with fewer is known without running them: the first streams do not see
those behind them. So drafts of all streams are compared now and then, and where fewer would do, all
are still asked once in a while. Pure and deterministic, as the planner is.
"""

from __future__ import annotations

import numpy as np

COMPARED = 8  # drafts of all streams that stand for the next ones
SPARED = 4  # once there are so many, one draft of so many is compared
AGAIN = 16  # drafts of fewer streams, before all are asked again
DEARER = 20  # as many for each plain token that all of them cost more, if that is more
WORTH_IT = 0.02  # of the speed; a smaller gain is not worth another kind of pass


class Gammas:
    """Chooses among ``few`` and all.

    Args:
        few: numbers of streams that may draft instead of all, ascending; () means that there is nothing
            to choose.
        sizes: how many sizes of a pass there are.

    Attributes:
        usual: what is chosen: one of ``few``, or None for all streams.
    """

    def __init__(self, few: tuple[int, ...], sizes: int):
        self.options: tuple[int | None, ...] = (*few, None)
        self.usual: int | None = None
        self._seen = np.zeros((0, len(self.options), sizes))
        self._drafts = 0  # since the last comparison

    def asks_all(self, dearer: float) -> bool:
        """It is time to ask all streams again, though fewer are usual.

        Args:
            dearer: what they cost more than the usual ones, in plain tokens.
        """
        return self.usual is not None and self._drafts >= max(AGAIN, DEARER * dearer)

    @property
    def compares(self) -> bool:
        """A draft of all streams, if that is what there is now, is to be compared."""
        due = self.usual is not None or len(self._seen) < COMPARED or self._drafts >= SPARED
        return due and len(self.options) > 1

    def ran(self) -> None:
        """Streams ran, however many."""
        self._drafts += 1

    def add(self, promises: np.ndarray) -> None:
        """What a draft of all streams would have promised with each of ``options``, float [options, sizes]."""
        self._seen = np.concatenate([self._seen[1 - COMPARED :], promises[None]])
        self._drafts = 0

    def forget(self) -> None:
        """The text is another one: all comparisons but the last are of no use."""
        self._seen = self._seen[-1:]

    def of(self, option: int) -> np.ndarray:
        """What recent drafts would have promised with an option (its index), float [drafts, sizes]."""
        return self._seen[:, option]

    @property
    def of_usual(self) -> np.ndarray:
        return self.of(self.options.index(self.usual))

    def settle(self, speeds: list[float]) -> bool:
        """Choose by the speed of each option; True if the choice has changed."""
        best = int(np.argmax(speeds))
        if speeds[best] <= (1 + WORTH_IT) * speeds[self.options.index(self.usual)]:
            return False
        self.usual = self.options[best]
        return True
