"""Training of streams: the loop, its schedule, its checkpoints. Knows nothing of decoding."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import BadArgument, BadCheckpoint
from ..model.checkpoint import compare, fingerprint, save_tensors
from ..model.seams import Seams
from .data import Batch, Example, batches, make_batch
from .loss import evaluate, stream_losses

CHECKPOINT = "checkpoint.safetensors"
WARM_UP = 0.03  # of the run
VALID_ROWS = 200  # examples that validation reads
VALID_HOSTS = 8  # host rows read of each
TOP_K = 4  # the accuracy reported beside top-1


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        iters: steps of the run.
        minutes: stop after this much training time, the schedule stretched to fit; None for iters.
        batch_size: sequences per step.
        hosts: positions per sequence that get streams in a step: a few each and many steps learn
            faster than all positions of few steps.
        learning_rate: peak rate of the LoRA; linear warm-up, then linear decay to zero.
        embedding_rate: peak rate of P_j, as a multiple of ``learning_rate``.
        stream_decay: alpha_j = stream_decay ** (j - 1), the weight of stream j in the loss.
        seed: of the initial values and of the order of the data.
        eval_every: steps between validations.
        save_every: steps between checkpoints.
    """

    iters: int = 3000
    minutes: float | None = None
    batch_size: int = 4
    hosts: int = 16
    learning_rate: float = 1e-3
    embedding_rate: float = 20.0
    stream_decay: float = 0.8
    seed: int = 0
    eval_every: int = 200
    save_every: int = 200

    def __post_init__(self):
        for name in ("iters", "batch_size", "hosts", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise BadArgument(f"[train] '{name}' must be >= 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "embedding_rate", "stream_decay"):
            if not getattr(self, name) > 0:
                raise BadArgument(f"[train] '{name}' must be > 0, got {getattr(self, name)}.")
        if self.seed < 0:
            raise BadArgument(f"[train] 'seed' must be >= 0, got {self.seed}.")
        if self.minutes is not None and not self.minutes > 0:
            raise BadArgument(f"[train] 'minutes' must be > 0, got {self.minutes}.")


@dataclass(frozen=True)
class Progress:
    """What a step reports: losses per stream [g], share of the run done, validation if it ran."""

    iteration: int
    done: float
    seconds: float
    losses: list[float]
    validation: dict[str, list[float]] | None = None


class Trainer:
    """Trains the streams of an attached model.

    Args:
        seams: the attached model, with streams.
        config: how to train.
        folder: where checkpoints go.
        base: ``fingerprint`` of the base, which a checkpoint must match.
    """

    def __init__(
        self, seams: Seams, config: TrainConfig, folder: Path, base: dict[str, Any] | None = None
    ):
        self.seams, self.config, self.folder = seams, config, folder
        self.base = fingerprint(seams.model) if base is None else base
        self.iteration, self.seconds, self.history = 0, 0.0, []
        self.stop_requested = False
        fast = lambda name, _: name.startswith("embeddings")  # noqa: E731
        self.optimizer = optim.MultiOptimizer(
            [
                optim.AdamW(config.learning_rate, weight_decay=0.0),
                optim.AdamW(config.learning_rate, weight_decay=0.01),
            ],
            [fast],
        )
        self.optimizer.init(seams.streams.trainable_parameters())
        weights = mx.array(
            [config.stream_decay**j for j in range(seams.streams.config.num_streams)]
        )

        def loss(batch):
            losses, exit_loss = stream_losses(seams, batch)
            return (losses * weights).sum() / weights.sum() + exit_loss, losses

        self._step = nn.value_and_grad(seams.streams, loss)

    @property
    def done(self) -> float:
        """Share of the run that is done, 0..1."""
        if self.config.minutes is not None:
            return min(1.0, self.seconds / (60 * self.config.minutes))
        return min(1.0, self.iteration / self.config.iters)

    def run(self, train: list[Example], valid: list[Example], report: Callable[[Progress], None]):
        """Train to the end of the run (or go on with it). Set ``stop_requested`` to end it early.

        Args:
            report: called after every step.

        Raises:
            BadArgument: the loss became NaN or infinite (the advice is in the message).
            KeyboardInterrupt: ``stop_requested``; the checkpoint is written.
        """
        g = self.seams.streams.config.num_streams
        source = batches(
            train,
            size=self.config.batch_size,
            hosts=self.config.hosts,
            num_streams=g,
            seed=self.config.seed,
            first=self.iteration,
        )
        held_out = validation_batches(valid, self.config.batch_size, g)
        clock = time.perf_counter() - self.seconds
        while self.done < 1.0:
            if self.stop_requested:  # between two steps, so that what is saved is whole
                self.save()
                raise KeyboardInterrupt
            losses = self.step(next(source))
            if not all(map(math.isfinite, losses)):
                raise BadArgument(
                    f"[train] the loss became {losses} at step {self.iteration}; train with a lower "
                    f"--learning-rate than {self.config.learning_rate}."
                )
            self.seconds = time.perf_counter() - clock
            validation = None
            if self.iteration % self.config.eval_every == 0 or self.done >= 1.0:
                validation = evaluate(self.seams, held_out, TOP_K)
                self.history.append({"iteration": self.iteration, **validation})
                self.seconds = time.perf_counter() - clock  # a user waits for it too
            if self.iteration % self.config.save_every == 0:
                self.save()
            report(Progress(self.iteration, self.done, self.seconds, losses, validation))

    def step(self, batch: Batch) -> list[float]:
        """One update; returns the loss of each stream."""
        rate = self.config.learning_rate * min(
            (self.done + 1e-3) / WARM_UP, (1.0 - self.done) / (1.0 - WARM_UP)
        )
        embeddings, lora = self.optimizer.optimizers
        embeddings.learning_rate, lora.learning_rate = rate * self.config.embedding_rate, rate
        (_, losses), gradient = self._step(batch)
        gradient, _ = optim.clip_grad_norm(gradient, max_norm=1.0)
        self.optimizer.update(self.seams.streams, gradient)
        mx.eval(losses, self.seams.streams.parameters(), self.optimizer.state)
        self.iteration += 1
        return losses.tolist()

    def save(self) -> None:
        """Write the checkpoint (whole or not at all)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            **{f"streams.{k}": v for k, v in tree_flatten(self.seams.streams.parameters())},
            **{f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer.state)},
        }
        about = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "history": self.history,
            "streams": self.seams.streams.config.to_json(),
            "config": asdict(self.config),
            "base": self.base,
        }
        temporary = self.folder / f".{CHECKPOINT}.tmp.safetensors"
        save_tensors(temporary, state, {"about": json.dumps(about)})
        os.replace(temporary, self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Go on from the checkpoint in the folder.

        Raises:
            BadCheckpoint: there is none, it is damaged, or it is of other streams or another run.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            raise BadCheckpoint(
                f"[train] nothing to resume: {path} is missing; start without --resume."
            )
        try:
            state, metadata = mx.load(str(path), return_metadata=True)
            about = json.loads(metadata["about"])
        except (RuntimeError, KeyError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise BadCheckpoint(
                f"[train] {path} cannot be read: {line}; start without --resume."
            ) from None
        for name, ours in (
            ("streams", self.seams.streams.config.to_json()),
            ("config", asdict(self.config)),
        ):
            for key, value in ours.items():
                if about[name].get(key) != value and key not in ("iters", "minutes"):
                    raise BadCheckpoint(
                        f"[train] {path} was made with {key} = {about[name].get(key)}, not {value}; "
                        "resume with the same settings."
                    )
        part = lambda prefix: [  # noqa: E731
            (k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix)
        ]
        if compare(about["base"], self.base)[0] != "same":
            raise BadCheckpoint(f"[train] {path} is of another base; start without --resume.")
        self.seams.streams.load_weights(part("streams."))
        self.optimizer.state = tree_unflatten(part("optimizer."))
        self.iteration, self.seconds = about["iteration"], about["seconds"]
        self.history = about["history"]


def validation_batches(examples: list[Example], size: int, num_streams: int) -> list[Batch]:
    """The same few hosts of the same examples, every time."""
    rng = np.random.default_rng(0)
    chosen = sorted(examples[:VALID_ROWS], key=lambda e: len(e.tokens))
    picked = [np.sort(rng.permutation(np.array(e.hosts()))[:VALID_HOSTS]) for e in chosen]
    return [
        make_batch(chosen[i : i + size], picked[i : i + size], num_streams)
        for i in range(0, len(chosen), size)
    ]
