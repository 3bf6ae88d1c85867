"""What a run will take, from a few steps on trial before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from ..errors import BadArgument
from .data import Batch, Example, make_batch
from .trainer import Trainer

TRIALS = 2  # timed steps


@dataclass(frozen=True)
class Estimate:
    """A forecast: seconds to the end of the run, and bytes that it will take at most."""

    seconds: float
    memory: int

    def __str__(self) -> str:
        """``about 41 min, 3.2 GB``"""
        return f"about {duration(self.seconds)}, {self.memory / 1e9:.1f} GB"


def estimate(trainer: Trainer, train: list[Example], valid: list[Example]) -> Estimate:
    """Try the longest rows (whatever does not fit into memory fails here), then time typical steps.

    Nothing is updated: the run that follows is the one it would have been.

    Raises:
        BadArgument: the device has no room for the longest rows.
    """
    config = trainer.config
    mx.reset_peak_memory()
    try:
        _seconds(lambda: trainer.gradient(longest(trainer, train)))
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("alloc", "memory")):
            raise
        raise BadArgument(
            f"[train] the longest rows do not fit into memory: {error}; use a smaller --batch-size (with "
            "--grad-accumulation-steps), fewer --hosts, --grad-checkpoint or a shorter --max-seq-length."
        ) from error
    steps = [
        _seconds(lambda: trainer.gradient(batch))  # noqa: B023  called at once
        for batch in islice(trainer.source(train), TRIALS)
    ]
    step = min(steps) * config.grad_accumulation_steps
    held_out = trainer.held_out(valid)
    look = _seconds(lambda: trainer.evaluate(held_out[-1:])) * len(held_out)  # the longest of them
    if trainer.look is not None:
        look += _seconds(lambda: trainer.look(1))
    if config.minutes is not None:
        seconds = 60 * config.minutes * (1.0 - trainer.done)
    else:
        left = config.iters - trainer.iteration
        looks = config.iters // config.eval_every - trainer.iteration // config.eval_every
        looks += (config.iters % config.eval_every > 0) + (not trainer.history)
        seconds = left * step + looks * look
    return Estimate(seconds, mx.get_peak_memory())


def longest(trainer: Trainer, train: list[Example]) -> Batch:
    """The largest batch there can be."""
    size, hosts = trainer.config.batch_size, trainer.config.hosts
    numbers = sorted(range(len(train)), key=lambda k: -len(train[k].tokens))[:size]
    chosen = [train[k] for k in numbers]
    picked = [np.array(e.hosts()[-hosts:]) for e in chosen]
    g = trainer.seams.streams.config.num_streams
    return trainer.prepared(make_batch(chosen, picked, g, tuple(numbers)))


def duration(seconds: float) -> str:
    """``48 s``, ``41 min``, ``3.5 h``"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _seconds(do) -> float:
    tic = time.perf_counter()
    do()
    return time.perf_counter() - tic
