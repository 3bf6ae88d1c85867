"""Notices when a run goes wrong, and says what to do about it."""

from __future__ import annotations

import math
from collections import deque

from ..errors import BadArgument

FIRST, WINDOW = 10, 50  # steps: what the run began with, and what it is now
WORSE = 0.5  # of the least loss there was (or nats, if that is more): noise does not get there


class Health:
    """Looks at every step of a run.

    Args:
        learning_rate: of the run, for the advice.
    """

    def __init__(self, learning_rate: float):
        self.rate = learning_rate
        self.saved = 0  # step of the checkpoint
        self.least = math.inf  # mean loss, of the first steps or of any WINDOW since
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def check_finite(self, iteration: int, **values: float | list[float]) -> None:
        """Raise BadArgument for a NaN or an infinity, before it reaches what is trained."""
        for name, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            if all(map(math.isfinite, numbers)):
                continue
            if iteration == 0:
                raise BadArgument(
                    f"[train] the {name} is {value} before the first step: the base's own arithmetic "
                    "overflows; convert the base with --dtype bfloat16 or float32."
                )
            raise BadArgument(
                f"[train] the {name} became {value} at step {iteration}; {self.advice()}, and a float16 "
                "base needs --dtype bfloat16 or float32 at its conversion."
            )

    def check_progress(self, iteration: int, loss: float) -> None:
        """Raise BadArgument if the loss of the last steps is far above what it had come down to."""
        if len(self.first) < FIRST:
            self.first.append(loss)
            if len(self.first) == FIRST:
                self.least = min(self.least, sum(self.first) / FIRST)
        self.recent.append(loss)
        if len(self.recent) < WINDOW:
            return
        now = sum(self.recent) / WINDOW
        if now > self.least + WORSE * max(self.least, 1.0):
            raise BadArgument(
                f"[train] the run diverges: the loss was {self.least:.2f} and is {now:.2f} over the last "
                f"{WINDOW} steps (at step {iteration}); {self.advice()}."
            )
        self.least = min(self.least, now)

    def advice(self) -> str:
        return f"train with a lower --learning-rate than {self.rate:g}, say {self.rate / 3:.1g}" + (
            f" (or take what there was at step {self.saved}: --resume --iters {self.saved}, without --minutes)"
            if self.saved
            else ""
        )
