"""Training of streams: the loop, its schedule, its checkpoints. Knows nothing of decoding."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import BadArgument, BadCheckpoint
from ..model.checkpoint import compare, fingerprint, save_tensors
from ..model.seams import Seams
from .config import TrainConfig
from .data import Batch, Example, batches, digest, make_batch
from .hidden import HiddenStates
from .learner import Learner
from .loss import evaluate, stream_losses
from .recompute import Recompute

CHECKPOINT = "checkpoint.safetensors"
WARM_UP = 0.03  # of the run
VALID_ROWS = 200  # examples that validation reads
VALID_HOSTS = 8  # host rows read of each
TOP_K = 4  # the accuracy reported beside top-1
CHANGEABLE = ("iters", "minutes", "grad_checkpoint")  # by a run that goes on with another


@dataclass(frozen=True)
class Progress:
    """What a step reports.

    Args:
        iteration: steps done; done: share of the run, 0..1; seconds: of training so far.
        losses: of each stream [g]; main_loss: of the main stream (shared mode), or None.
        tokens_per_second: of the training rows, prompts counted and padding not, since the start.
        peak_memory: most memory in use so far, GB.
        validation: of ``evaluate``, if it ran.
    """

    iteration: int
    done: float
    seconds: float
    losses: list[float]
    main_loss: float | None = None
    tokens_per_second: float = 0.0
    peak_memory: float = 0.0
    validation: dict[str, list[float]] | None = None


class Trainer:
    """Trains the streams of an attached model.

    Args:
        seams: the attached model, with streams.
        config: how to train.
        folder: where checkpoints go.
        base: ``fingerprint`` of the base, which a checkpoint must match.
        main_lora: the modules of the model that are trained, too (shared mode).
        hidden: the hidden states of the training rows, if they are known.
    """

    def __init__(
        self,
        seams: Seams,
        config: TrainConfig,
        folder: Path,
        base: dict[str, Any] | None = None,
        main_lora: list[nn.Module] = (),
        hidden: HiddenStates | None = None,
    ):
        self.seams, self.config, self.folder, self.hidden = seams, config, folder, hidden
        self.base = fingerprint(seams.model) if base is None else base
        self.learner = Learner(seams.streams, list(main_lora))
        self.iteration, self.seconds, self.history, self.data = 0, 0.0, [], ""
        self.stop_requested = False
        self.recompute = Recompute(seams, self.learner) if config.grad_checkpoint else None
        fast = lambda name, _: name.startswith("streams.embeddings")  # noqa: E731
        self.optimizer = optim.MultiOptimizer(
            [
                optim.AdamW(config.learning_rate, weight_decay=0.0),
                optim.AdamW(config.learning_rate, weight_decay=0.01),
            ],
            [fast],
        )
        self.optimizer.init(self.learner.trainable_parameters())
        weights = mx.array(config.stream_weights(seams.streams.config.num_streams))
        shared = config.fine_tune is not None

        def loss(batch):
            losses, exit_loss, main = stream_losses(seams, batch, config.target, main=shared)
            total = (losses * weights).sum()
            # Without the main stream's loss beside it the scale is free: a mean over streams.
            total = main + total if shared else total / weights.sum()
            return total + exit_loss, losses, main

        self._gradient = nn.value_and_grad(self.learner, loss)

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
        self.data = digest(train, valid)
        config, source, held_out = self.config, self.source(train), self.held_out(valid)
        clock, tokens, begun = time.perf_counter() - self.seconds, 0, self.seconds
        while self.done < 1.0:
            if self.stop_requested:  # between two steps, so that what is saved is whole
                self.save()
                raise KeyboardInterrupt
            some = list(islice(source, config.grad_accumulation_steps))
            losses, main = self.step(*some)
            if not all(map(math.isfinite, [*losses, main])):
                raise BadArgument(
                    f"[train] the loss became {losses} at step {self.iteration}; train with a lower "
                    f"--learning-rate than {config.learning_rate}."
                )
            self.seconds = time.perf_counter() - clock
            tokens += sum(batch.num_tokens for batch in some)
            validation = None
            if self.iteration % config.eval_every == 0 or self.done >= 1.0:
                validation = self.evaluate(held_out)
                self.history.append({"iteration": self.iteration, **validation})
                self.seconds = time.perf_counter() - clock  # a user waits for it too
            if self.iteration % config.save_every == 0 or self.done >= 1.0:
                self.save()
            report(
                Progress(
                    self.iteration,
                    self.done,
                    self.seconds,
                    losses,
                    main if config.fine_tune else None,
                    tokens / max(self.seconds - begun, 1e-9),
                    mx.get_peak_memory() / 1e9,
                    validation,
                )
            )

    def source(self, train: list[Example]) -> Iterator[Batch]:
        """The batches that come next, without end."""
        found = batches(
            train,
            size=self.config.batch_size,
            hosts=self.config.hosts,
            num_streams=self.seams.streams.config.num_streams,
            seed=self.config.seed,
            first=self.iteration * self.config.grad_accumulation_steps,
        )
        return map(self.prepared, found)

    def prepared(self, batch: Batch) -> Batch:
        """A batch of training rows with what is known of it."""
        return batch if self.hidden is None else self.hidden.add_to(batch)

    def held_out(self, valid: list[Example]) -> list[Batch]:
        """The batches of every validation."""
        g = self.seams.streams.config.num_streams
        return validation_batches(valid, self.config.batch_size, g)

    def evaluate(self, held_out: list[Batch]) -> dict[str, list[float]]:
        return evaluate(self.seams, held_out, TOP_K, main=self.config.fine_tune is not None)

    def step(self, *some: Batch) -> tuple[list[float], float]:
        """One update from the mean gradient of some batches; returns the losses of the streams and of
        the main stream."""
        rate = self.config.learning_rate * min(
            (self.done + 1e-3) / WARM_UP, (1.0 - self.done) / (1.0 - WARM_UP)
        )
        embeddings, lora = self.optimizer.optimizers
        embeddings.learning_rate, lora.learning_rate = rate * self.config.embedding_rate, rate
        gradient, losses, main = self.gradient(some[0])
        for batch in some[1:]:
            more = self.gradient(batch)
            add = lambda a, b: a + b  # noqa: E731
            gradient, losses, main = (
                tree_map(add, gradient, more[0]),
                losses + more[1],
                main + more[2],
            )
        if len(some) > 1:
            gradient = tree_map(lambda x: x / len(some), gradient)
        gradient, _ = optim.clip_grad_norm(gradient, max_norm=1.0)
        self.optimizer.update(self.learner, gradient)
        mx.eval(self.learner.trainable_parameters(), self.optimizer.state)
        self.iteration += 1
        return (losses / len(some)).tolist(), main.item() / len(some)

    def gradient(self, batch: Batch) -> tuple[dict, mx.array, mx.array]:
        """Gradient, losses of the streams [g] and of the main stream []; nothing is updated."""
        before = self.learner.trainable_parameters()
        self.seams.around = self.recompute
        try:
            (_, losses, main), gradient = self._gradient(batch)
            mx.eval(losses, main, gradient)
        finally:
            self.seams.around = None
            self.learner.update(before)  # a gradient leaves what it was traced with
        return gradient, losses, main

    def save(self) -> None:
        """Write the checkpoint (whole or not at all)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "history": self.history,
            "streams": self.seams.streams.config.to_json(),
            "config": self.config.to_json(),
            "base": self.base,
            "data": self.data,
        }
        temporary = self.folder / f".{CHECKPOINT}.tmp.safetensors"
        save_tensors(temporary, self._state(), {"about": json.dumps(about)})
        os.replace(temporary, self.folder / CHECKPOINT)

    def _state(self) -> dict[str, mx.array]:
        return {
            **{f"learner.{k}": v for k, v in tree_flatten(self.learner.trainable_parameters())},
            **{f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer.state)},
        }

    def resume(self, data: str) -> None:
        """Go on from the checkpoint in the folder.

        Args:
            data: ``digest`` of the rows that it must have been trained and validated on.

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
            ("config", self.config.to_json()),
        ):
            for key, value in ours.items():
                if about[name].get(key) != value and key not in CHANGEABLE:
                    raise BadCheckpoint(
                        f"[train] {path} was made with {key} = {about[name].get(key)}, not {value}; "
                        "resume with the same settings."
                    )
        for what, same in (
            ("of another base", compare(about["base"], self.base)[0] == "same"),
            ("of other data", about.get("data") == data),
            ("of another version of mlx-specstream", state.keys() == self._state().keys()),
        ):
            if not same:
                raise BadCheckpoint(f"[train] {path} is {what}; start without --resume.")
        part = lambda prefix: tree_unflatten(  # noqa: E731
            [(k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix)]
        )
        self.learner.update(part("learner."))
        self.optimizer.state = part("optimizer.")
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
