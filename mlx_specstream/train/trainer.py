"""Training of streams: the loop, its schedule, its checkpoints. Knows nothing of decoding."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..config import StreamConfig
from ..errors import BadCheckpoint
from ..model.checkpoint import compare, fingerprint, save_tensors
from ..model.seams import Seams
from .config import TrainConfig
from .data import Batch, Example, batches, digest, make_batch, spread
from .health import Health
from .hidden import HiddenStates
from .identity import same_adapters
from .learner import Learner
from .loss import evaluate, exit_loss, stream_losses
from .presets import APART
from .recompute import Recompute

CHECKPOINT = "checkpoint.safetensors"
WARM_UP = 0.03  # of the run
VALID_ROWS = 200  # examples that validation reads
VALID_HOSTS = 8  # host rows read of each
TOP_K = 4  # the accuracy reported beside top-1
PROGRESS = 1e-3  # of the validation loss: less is none
SAVE_AFTER = 300.0  # seconds: slow steps are saved more often than save_every says
# By a run that goes on with another.
CHANGEABLE = (
    "iters", "minutes", "grad_checkpoint", "eval_every", "validations", "save_every", "patience",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """What a step reports.

    Args:
        iteration: steps done; done: share of the run, 0..1; seconds: of training so far.
        losses: of each stream [g] (of the early exit [1], if it is all that is trained); none before
            the first step. main_loss: of the main stream (shared mode), or None.
        tokens_per_second: of the training rows, prompts counted and padding not, since the start.
        peak_memory: most memory in use so far, GB.
        validation: of ``Trainer.validate``, if it ran.
    """

    iteration: int
    done: float
    seconds: float
    losses: list[float]
    main_loss: float | None = None
    tokens_per_second: float = 0.0
    peak_memory: float = 0.0
    validation: dict[str, Any] | None = None


class Trainer:
    """Trains the streams of an attached model.

    Args:
        seams: the attached model, with streams.
        config: how to train.
        folder: where checkpoints go.
        base: ``fingerprint`` of the base and ``adapters_of`` it, both of which a checkpoint must match.
        main_lora: the modules of the model that are trained, too (shared mode).
        hidden: the hidden states of the training rows, if they are known.
        hidden_rms: of the hidden states that P_j is added to.
        look: called with the number of every validation; what it returns is kept with it.

    Attributes:
        saved: called after every checkpoint.
        history: of every validation, that before the first step included: ``iteration``, ``seconds``,
            ``train_loss`` (mean of the steps since the one before, per stream), what ``evaluate`` and
            ``look`` found.
    """

    def __init__(
        self,
        seams: Seams,
        config: TrainConfig,
        folder: Path,
        base: dict[str, Any] | None = None,
        main_lora: list[nn.Module] = (),
        adapters: dict[str, float] | None = None,
        hidden: HiddenStates | None = None,
        hidden_rms: float = 1.0,
        look: Callable[[int], dict[str, Any]] | None = None,
    ):
        self.seams, self.config, self.folder, self.hidden = seams, config, folder, hidden
        self.hidden_rms, self.look = hidden_rms, look
        self.saved: Callable[[], None] = lambda: None
        self.base = fingerprint(seams.model) if base is None else base
        self.adapters = adapters or {}
        self.learner = Learner(seams.streams, list(main_lora), config.only)
        self.iteration, self.seconds, self.history, self.data = 0, 0.0, [], ""
        self.keeps_best = config.patience is not None or config.fine_tune is None
        self.best: dict[str, mx.array] | None = None  # values of the best validation, if kept
        self.validated = 0.0  # seconds of the run behind the last validation
        self.since: list[list[float]] = []  # losses of the steps since the last validation
        self.stop_requested = False
        self.health = Health(config.learning_rate)
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
            if config.only == "pruning":
                total = exit_loss(seams, batch, config.target)
                return total, total.reshape(1), mx.array(0.0)
            losses, of_exit, main = stream_losses(seams, batch, config.target, main=shared)
            total = (losses * weights).sum()
            # Without the main stream's loss beside it the scale is free: a mean over streams.
            total = main + total if shared else total / weights.sum()
            return total + of_exit, losses, main

        self._gradient = nn.value_and_grad(self.learner, loss)

    @property
    def done(self) -> float:
        """Share of the run that is done, 0..1."""
        if self.config.minutes is not None:
            return min(1.0, self.seconds / (60 * self.config.minutes))
        return min(1.0, self.iteration / self.config.iters)

    @property
    def validation_is_due(self) -> bool:
        """Is it time for one after this step?"""
        if self.config.eval_every is not None:
            return self.iteration % self.config.eval_every == 0
        last = self.history[-1]
        seconds = 60 * self.config.minutes / self.config.validations
        return (
            self.iteration - last["iteration"] >= APART and self.seconds - self.validated >= seconds
        )

    @property
    def patience_left(self) -> float:
        """Validations without progress that the run may still see."""
        if self.config.patience is None:
            return float("inf")
        best = self._best_validation()
        return self.config.patience - (0 if best is None else len(self.history) - 1 - best)

    def run(self, train: list[Example], valid: list[Example], report: Callable[[Progress], None]):
        """Train to the end of the run (or go on with it). Set ``stop_requested`` to end it early.

        Args:
            report: called once before the first step, with the validation of what streams begin with,
                and after every step.

        Raises:
            BadArgument: the loss became NaN or infinite, or diverges (the advice is in the message).
            KeyboardInterrupt: ``stop_requested``; the checkpoint is written.
        """
        self.data = digest(train, valid)
        config, source, held_out = self.config, self.source(train), self.held_out(valid)
        if not self.history:
            first = self.validate(held_out)
            report(Progress(self.iteration, self.done, self.seconds, [], validation=first))
        clock, tokens, begun = time.perf_counter() - self.seconds, 0, self.seconds
        saved = begun
        while self.done < 1.0 and self.patience_left > 0:
            if self.stop_requested:  # between two steps, so that what is saved is whole
                self.save()
                raise KeyboardInterrupt
            some = list(islice(source, config.grad_accumulation_steps))
            losses, main = self.step(*some)
            self.health.check_progress(self.iteration, sum(losses) / len(losses) + main)
            self.since.append(losses)
            self.seconds = time.perf_counter() - clock
            tokens += sum(batch.num_tokens for batch in some)
            validation = None
            if self.done >= 1.0 or self.validation_is_due:
                validation = self.validate(held_out)
                self.seconds = time.perf_counter() - clock  # a user waits for it too
                self.validated = self.seconds
            ends = self.done >= 1.0 or self.patience_left <= 0
            if self.iteration % config.save_every == 0 or ends or self.seconds - saved > SAVE_AFTER:
                self.save()
                saved = self.seconds
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
        if self.history[-1]["iteration"] != self.iteration:  # resumed, to end where it stopped
            self.validate(held_out)

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

    def validate(self, held_out: list[Batch]) -> dict[str, Any]:
        """Look at what there is now; the new last entry of ``history``."""
        found = self.evaluate(held_out)
        self.health.check_finite(self.iteration, **{"validation loss": found["loss"]})
        if self.look is not None:
            found |= self.look(len(self.history))
        means = [sum(column) / len(self.since) for column in zip(*self.since, strict=True)]
        at = {"iteration": self.iteration, "seconds": round(self.seconds, 3), "train_loss": means}
        self.history.append({**at, **found})
        self.since = []
        if self.keeps_best and self._best_validation() == len(self.history) - 1:
            self.best = dict(tree_flatten(self.learner.trainable_parameters()))
        return self.history[-1]

    def _best_validation(self) -> int | None:
        """Index in ``history`` of the best one; one that is hardly better does not count."""
        best, least = None, float("inf")
        for index, found in enumerate(self.history):
            if self.config.only == "pruning":
                loss = found["exit_loss"][0]
            else:
                loss = sum(found["loss"]) / len(found["loss"]) + sum(found.get("main_loss", []))
            if best is None or loss < least - PROGRESS * abs(least):
                best, least = index, loss
        return best

    def take_best(self) -> int:
        """Go back to the values of the best validation, if they were kept; returns their step."""
        if self.best is None:
            return self.iteration
        self.learner.update(tree_unflatten(list(self.best.items())))
        return self.history[self._best_validation()]["iteration"]

    def step(self, *some: Batch) -> tuple[list[float], float]:
        """One update from the mean gradient of some batches; returns the losses of the streams and of
        the main stream."""
        rate = self.config.learning_rate * min(
            (self.done + 1e-3) / WARM_UP, (1.0 - self.done) / (1.0 - WARM_UP)
        )
        embeddings, lora = self.optimizer.optimizers
        embeddings.learning_rate = rate * self.config.embedding_rate * self.hidden_rms
        lora.learning_rate = rate
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
        gradient, norm = optim.clip_grad_norm(gradient, max_norm=1.0)
        of_streams, of_main = (losses / len(some)).tolist(), main.item() / len(some)
        number = self.iteration + 1
        self.health.check_finite(number, loss=[*of_streams, of_main], gradient=norm.item())
        self.optimizer.update(self.learner, gradient)
        mx.eval(self.learner.trainable_parameters(), self.optimizer.state)
        self.iteration += 1
        return of_streams, of_main

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
        self.health.saved = self.iteration
        about = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "history": self.history,
            "since": self.since,
            "hidden_rms": self.hidden_rms,
            "least_loss": self.health.least,
            "streams": self.seams.streams.config.to_json(),
            "config": self.config.to_json(),
            "base": self.base,
            "adapters": self.adapters,
            "draft_vocabulary": self._drafted(),
            "data": self.data,
        }
        temporary = self.folder / f".{CHECKPOINT}.tmp.safetensors"
        save_tensors(temporary, self._state(), {"about": json.dumps(about)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a name without content
        os.replace(temporary, self.folder / CHECKPOINT)
        self.saved()

    def _drafted(self) -> int:
        """Tokens of the draft vocabulary; 0: the whole one."""
        chosen = self.seams.streams.draft_vocabulary
        return 0 if chosen is None else chosen.size

    def _state(self) -> dict[str, mx.array]:
        return {
            **{f"best.{k}": v for k, v in (self.best or {}).items()},
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
            if not {"streams", "config", "base", "history", "since", "hidden_rms"} <= about.keys():
                raise ValueError("it is of another version of mlx-specstream")
            theirs = {"streams": asdict(StreamConfig.from_json(about["streams"]))}
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            line = str(error).splitlines()[0]
            raise BadCheckpoint(
                f"[train] {path} cannot be read: {line}; start without --resume."
            ) from None
        theirs["config"] = about["config"]
        for name, ours in (
            ("streams", asdict(self.seams.streams.config)),
            ("config", self.config.to_json()),
        ):
            for key, value in ours.items():
                if theirs[name].get(key) != value and key not in CHANGEABLE:
                    raise BadCheckpoint(
                        f"[train] {path} was made with {key} = {theirs[name].get(key)}, not {value}; "
                        "resume with the same settings."
                    )
        if self.keeps_best and about["history"] and not _kept_best(about["config"]):
            raise BadCheckpoint(
                f"[train] {path} was made without --patience: the best values until now were not kept; "
                "resume without it."
            )
        known = {name for name in state if not name.startswith("best.")}
        for what, same in (
            ("of another base", compare(about["base"], self.base)[0] == "same"),
            (
                "of this base with other adapters",
                same_adapters(about.get("adapters", self.adapters), self.adapters),
            ),
            (
                "of another --draft-vocabulary",
                about.get("draft_vocabulary", self._drafted()) == self._drafted(),
            ),
            ("of other data", about.get("data") == data),
            ("of another version of mlx-specstream", known == self._state().keys()),
        ):
            if not same:
                raise BadCheckpoint(f"[train] {path} is {what}; start without --resume.")
        part = lambda prefix: tree_unflatten(  # noqa: E731
            [(k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix)]
        )
        self.learner.update(part("learner."))
        self.optimizer.state = part("optimizer.")
        self.iteration, self.seconds = about["iteration"], about["seconds"]
        self.validated = self.seconds
        self.history, self.since = about["history"], about["since"]
        self.hidden_rms, self.health.saved = about["hidden_rms"], self.iteration
        self.health.least = about.get("least_loss", math.inf)
        best = {k.removeprefix("best."): v for k, v in state.items() if k not in known}
        self.best = best if best and self.keeps_best else None


def _kept_best(config: dict[str, Any]) -> bool:
    """Did a run with these settings (of its checkpoint) keep the values of its best validation?"""
    return config["patience"] is not None or config["fine_tune"] is None


def validation_batches(examples: list[Example], size: int, num_streams: int) -> list[Batch]:
    """The same few hosts of the same examples, every time."""
    rng = np.random.default_rng(0)
    chosen = [examples[number] for number in spread(len(examples), VALID_ROWS)]
    chosen.sort(key=lambda e: len(e.tokens))
    picked = [np.sort(rng.permutation(np.array(e.hosts()))[:VALID_HOSTS]) for e in chosen]
    return [
        make_batch(chosen[i : i + size], picked[i : i + size], num_streams)
        for i in range(0, len(chosen), size)
    ]
