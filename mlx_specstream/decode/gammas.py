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
WORTH_IT = 0.01  # of the speed; a smaller gain changes nothing


class Gammas:
    """Chooses among ``few`` and all.

    Args:
        few: numbers of streams that may draft instead of all, ascending; () means that there is nothing
            to choose.
        sizes: how many sizes of a pass there are.

    Attributes:
        usual: what is chosen: one of ``few``, or None for all streams.
        compares: the draft that is made now comes from all streams and is to be compared.
    """

    def __init__(self, few: tuple[int, ...], sizes: int):
        self.options: tuple[int | None, ...] = (*few, None)
        self.usual: int | None = None
        self.compares = False
        self._seen = np.zeros((0, len(self.options), sizes))
        self._drafts = 0  # since all were asked, or since the last comparison

    @property
    def now(self) -> int | None:
        """Of the streams behind the pass that comes now."""
        return None if self._drafts >= AGAIN else self.usual

    def ran(self) -> None:
        """Streams ran, as many as ``now`` says."""
        everyone, some = self.now is None, self.usual is not None
        due = some or len(self._seen) < COMPARED or self._drafts >= SPARED
        self.compares = len(self.options) > 1 and everyone and due
        self._drafts = 0 if self.compares else self._drafts + 1

    def add(self, promises: np.ndarray) -> None:
        """What a draft would have promised with each of ``options``, float [options, sizes]."""
        self._seen = np.concatenate([self._seen[1 - COMPARED :], promises[None]])

    def of(self, option: int) -> np.ndarray:
        """What recent drafts would have promised with an option (its index), float [drafts, sizes]."""
        return self._seen[:, option]

    def settle(self, speeds: list[float]) -> bool:
        """Choose by the speed of each option; True if the choice has changed."""
        best = int(np.argmax(speeds))
        if speeds[best] <= (1 + WORTH_IT) * speeds[self.options.index(self.usual)]:
            return False
        self.usual, self._drafts = self.options[best], 0
        return True
