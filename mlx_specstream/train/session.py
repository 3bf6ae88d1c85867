"""One training run from a stock model and a data folder to a streams folder."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import StreamConfig
from ..errors import BadArgument
from ..model.checkpoint import fingerprint, read_description, save_streams
from ..model.projections import embedding_of, weight_shape
from ..model.seams import Seams, attach
from ..model.support import ONE_MASK, check_supported
from .answers import SelfDistill, answered, settings_of, try_answering
from .calibration import fit_temperatures
from .config import TrainConfig
from .data import Example, digest, has_split, in_both, read_examples, spread
from .estimate import estimate
from .hidden import hidden_states
from .identity import adapters_of, identity_from
from .initial import begin_from as take_over
from .initial import hidden_rms, new_streams, scale_embeddings
from .record import ancestry, versions, write_record
from .report import DataReport
from .shared import Destination, add_lora, fuse, save_fused
from .trainer import CHECKPOINT, Progress, Trainer
from .vocabulary import from_examples

MAX_HELD_OUT = 200  # rows taken from the training data where there is no validation file
MOST_HELD_OUT = 0.2  # of all rows, where every prompt has many


class Look(Protocol):
    """What a run's validations see besides losses: the package's other half, which decodes.

    Called between steps; what it does to the model it must undo.
    """

    def prepare(self, seams: Seams, valid: list[Example]) -> None:
        """Before the run."""

    def __call__(self, number: int) -> dict[str, Any]:
        """At validation ``number`` (0: before the first step); the result goes into the history."""


@dataclass(frozen=True)
class Data:
    """Examples to train on and held-out ones, and what was wrong with the rows."""

    train: list[Example]
    valid: list[Example]
    reports: list[DataReport]


def train_streams(
    model: nn.Module,
    tokenizer,
    data: Path | Data,
    out: Path,
    streams: StreamConfig,
    config: TrainConfig,
    *,
    fused: Destination | None = None,
    self_distill: SelfDistill | None = None,
    cache_hidden: Path | None = None,
    max_length: int = 2048,
    draft_vocabulary: int = 0,
    resume: bool = False,
    begin_from: Path | None = None,
    dry_run: bool = False,
    look: Look | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    saved: Callable[[dict[str, Any]], None] = lambda about: None,
) -> dict[str, Any]:
    """Train streams for a model and write them to ``out``.

    Lossless mode leaves the model as it is. Shared mode (``config.fine_tune``) trains it, too: it is
    changed in place, written to ``fused``, and the streams belong to it and not to the base.
    A finished streams folder in ``out`` stays as it is until the new run is finished.

    Args:
        data: folder with train.jsonl[.gz] and, if there is one, valid.jsonl[.gz]; or what was read.
        fused: where shared mode puts the model.
        self_distill: train on the base's own answers to the prompts of the data.
        cache_hidden: folder for the hidden states of the frozen lower layers, which are then made
            once instead of in every step.
        max_length: longer rows are cut to this many tokens.
        draft_vocabulary: drafts will hold only this many tokens, the most frequent ones of the
            completions, and end of sequence; 0: all. The loss takes the whole head all the same.
        resume: go on from the checkpoint in ``out``.
        begin_from: a streams folder of this base whose arrays are the initial values, as far as names
            and shapes agree; what it lacks begins as usual.
        dry_run: say what there is to say before a run, and stop there. Nothing is written.
        look: looked at with every validation.
        report: called after every step; ``note``: called with lines for the user.
        saved: called with the content of ``train.json`` after every checkpoint.

    Returns:
        What is stored as ``training`` in streams.json (of a dry run: as far as it is known).

    Raises:
        BadData, BadArgument, BadCheckpoint, UnsupportedModel
    """
    _check(model, streams, config, fused, cache_hidden, max_length, draft_vocabulary, begin_from)
    if isinstance(data, Path):
        data = read_data(data, tokenizer, max_length, note, answers=self_distill is None)
    train, valid = data.train, data.valid
    if self_distill is not None:
        trying = dry_run and not resume  # to go on, the rows must be the ones of before
        answer = partial(try_answering if trying else answered, model, tokenizer)
        train, valid = (answer(some, self_distill, max_length, note) for some in (train, valid))
    mx.random.seed(config.seed)
    base, adapters = fingerprint(model), adapters_of(model)
    main_lora = add_lora(model, config.fine_tune, streams.msa_layers) if config.fine_tune else []
    parameters = new_streams(model, streams)
    if draft_vocabulary:
        parameters.draft_vocabulary, line = from_examples(
            train, draft_vocabulary, tokenizer.eos_token_ids, weight_shape(embedding_of(model))[0]
        )
        note(line)
    seams = attach(model, parameters)
    rms = hidden_rms(seams, train[: config.batch_size])
    scale_embeddings(seams, rms)
    if begin_from is not None:
        note(take_over(begin_from, seams))
    trainer = Trainer(seams, config, out, base, main_lora, adapters, hidden_rms=rms, look=look)
    extra, line = _sizes(trainer)
    note(f"{len(train)} rows to train on, {len(valid)} held out; {line}")
    if resume:
        trainer.resume(digest(train, valid))
        note(f"resumed at step {trainer.iteration}")
    if look is not None:
        look.prepare(seams, valid)
    about = {
        "mode": config.mode,
        "config": config.to_json(),
        "parameters": extra,
        "hidden_rms": trainer.hidden_rms,
        "data": digest(train, valid),
        "self_distilled": self_distill is not None,
        "self_distill": None if self_distill is None else settings_of(self_distill),
        "max_seq_length": max_length,
        "draft_vocabulary": draft_vocabulary,
        "began_from": None
        if begin_from is None
        else ancestry(read_description(begin_from)["training"]),
        "versions": versions(),
    }
    hidden = partial(hidden_states, seams, train, cache_hidden, identity_from(base, adapters), note)
    if dry_run:
        trainer.hidden = None if cache_hidden is None else hidden(make=False)
        note(f"{estimate(trainer, train, valid)}; nothing was trained (--dry-run)")
        return about
    if not resume and (out / CHECKPOINT).exists():
        note(
            f"{out / CHECKPOINT} of an earlier run will be replaced (--resume would go on with it)"
        )
    out.mkdir(parents=True, exist_ok=True)  # an output that cannot be written fails before the run
    if cache_hidden is not None:
        trainer.hidden = hidden()

    def keep_record(**more: Any) -> None:
        seconds = {"steps": trainer.iteration, "seconds": round(trainer.seconds, 1)}
        files = {"files": [counted.to_json() for counted in data.reports]}
        found = {**about, **seconds, **files, "streams": streams.to_json(), "finished": False}
        found |= {"history": trainer.history, **more}
        write_record(out, found)
        saved(found)

    trainer.saved = keep_record
    with stop_between_steps(trainer):
        if trainer.done < 1.0:
            note(f"{estimate(trainer, train, valid)}")
        trainer.run(train, valid, report)
    about |= _outcome(trainer, valid, note)
    if fused is not None:
        model = fuse(model, fused.dequantize)
        save_fused(model, tokenizer, fused)
        base = fingerprint(model)
        attach(model, parameters)
    save_streams(out, parameters, base, about)
    calibration = {}
    if parameters.temperatures is not None:
        calibration = {"temperatures": parameters.temperatures.tolist()}
    keep_record(finished=True, **calibration)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return about


def _sizes(trainer: Trainer) -> tuple[int, str]:
    """How many parameters the streams have, and a line that says so; raises if none is trained."""
    count = lambda tree: sum(v.size for _, v in tree_flatten(tree))  # noqa: E731
    extra = count(trainer.seams.streams.parameters())
    trained = count(trainer.learner.trainable_parameters())
    if not trained:
        raise BadArgument("[train] nothing to train: no LoRA, no embeddings; use --lora-rank.")
    line = f"{extra:,} parameters in the streams"
    if trainer.config.only:
        line += f", {trained:,} of them trained"
    elif trained > extra:
        line += f", {trained - extra:,} in the model's LoRA"
    return extra, line


def _outcome(trainer: Trainer, valid: list[Example], note: Callable[[str], None]) -> dict[str, Any]:
    """Take the values that the run is for, fit the temperatures; what there is to say about it."""
    config, streams = trainer.config, trainer.seams.streams
    if trainer.done < 1.0:
        note(f"no progress in {config.patience} validations: stopped at step {trainer.iteration}")
    taken = trainer.take_best()
    if taken < trainer.iteration:
        note(f"the streams of step {taken} are taken, the best on the held-out rows")
    found = next(h for h in reversed(trainer.history) if h["iteration"] == taken)
    before, now = (sum(h.get("main_loss", [])) for h in (trainer.history[0], found))
    if now > before:
        note(
            f"the model itself is worse on the held-out rows than it was: its loss was {before:.3f} and "
            f"is {now:.3f}. If it knew the task already, --mode lossless leaves it as it is; else train "
            f"longer, or with a lower --learning-rate than {config.learning_rate:g}"
        )
    about = {
        "steps": trainer.iteration,
        "seconds": round(trainer.seconds, 1),
        "taken": taken,
        "validation": {name: value for name, value in found.items() if name != "seconds"},
    }
    if config.only is None:
        streams.temperatures, about["calibration"] = fit_temperatures(
            trainer.seams, trainer.held_out(valid)
        )
        note("temperatures of the streams: " + " ".join(f"{t:.2f}" for t in streams.temperatures))
    return about


def _check(
    model: nn.Module,
    streams: StreamConfig,
    config: TrainConfig,
    fused: Destination | None,
    cache_hidden: Path | None,
    max_length: int,
    draft_vocabulary: int,
    begin_from: Path | None,
) -> None:
    """What cannot end well does not begin."""
    check_supported(model)
    layers, fine_tune = len(model.layers), config.fine_tune
    if streams.main_sees_streams and config.only:
        raise BadArgument(
            "[train] 'only' cannot be used with streams that the model sees ([P]): it would change what "
            "the model says; train the early exit with them, by --prune-rank."
        )
    if streams.main_sees_streams and fine_tune is None:
        raise BadArgument(
            "[train] main_sees_streams changes the base's output; lossless training cannot. Use "
            "--mode shared."
        )
    if (fused is None) != (fine_tune is None):
        raise BadArgument(
            "[train] shared mode makes a new model, lossless mode none; name its folder with "
            "--fused-path in shared mode alone."
        )
    if streams.msa_layers > layers:
        raise BadArgument(
            f"[train] 'msa_layers' must be at most the model's {layers} layers, got "
            f"{streams.msa_layers}."
        )
    if model.model_type in ONE_MASK and config.batch_size > 1:
        raise BadArgument(
            f"[train] 'batch_size' must be 1 for {model.model_type}, whose attention takes one mask per "
            f"batch; got {config.batch_size}."
        )
    if cache_hidden is not None and fine_tune and fine_tune.num_layers != streams.msa_layers:
        raise BadArgument(
            "[train] 'cache_hidden' needs lower layers that do not change; in shared mode give the LoRA "
            f"to the MSA layers alone (--num-layers {streams.msa_layers})."
        )
    if config.only == "pruning" and not (streams.prune_rank and begin_from and not fine_tune):
        raise BadArgument(
            "[train] 'only' pruning trains the early-exit head of finished streams: begin from some, in "
            "lossless mode, with a --prune-rank."
        )
    if max_length < 3:
        raise BadArgument(f"[train] 'max_seq_length' must be >= 3 tokens, got {max_length}.")
    if draft_vocabulary < 0:
        raise BadArgument(f"[train] 'draft_vocabulary' must be >= 0, got {draft_vocabulary}.")
    config.stream_weights(streams.num_streams)


@contextmanager
def stop_between_steps(trainer: Trainer):
    """Ctrl-C and SIGTERM end the run after the step in progress; a second one at once."""

    def stop(signum, frame):
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals belong to the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_data(
    data: Path, tokenizer, max_length: int, note: Callable[[str], None], answers: bool = True
) -> Data:
    """What is in a folder, after saying what cannot be used of it.

    Args:
        answers: False if the rows are there for their prompts, which the model will answer itself.
    """
    train, report = read_examples(data, "train", tokenizer, max_length, answers)
    reports = [report]
    if has_split(data, "valid"):
        valid, other = read_examples(data, "valid", tokenizer, max_length, answers)
        if answers:
            other.trained_on = in_both(train, valid)
        else:  # the same prompt would get the same answer
            train, other.shared = without_prompts_of(valid, train)
        reports.append(other)
    elif len(train) < 2:
        raise BadArgument(f"[train] {data} has one training row and no validation file; add rows.")
    else:
        train, valid = held_out(train)
    if not train:
        raise BadArgument(f"[train] every prompt of {data} is held out for validation; add rows.")
    for line in (line for found in reports for line in found.lines()):
        note(line)
    if len(reports) == 1:
        note(f"no valid.jsonl: {len(valid)} training rows are held out for validation")
    return Data(train, valid, reports)


def held_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): evenly spread over the file, and all rows of a prompt on one side.

    A prompt with more rows than are to be held out stays, if others have fewer. Where that leaves none,
    only rows that are wholly alike stay together; where all are, none do.
    """
    rows = min(MAX_HELD_OUT, max(1, len(examples) // 20))
    for keys in (
        [tuple(e.tokens[: e.start]) or tuple(e.tokens) for e in examples],
        [tuple(e.tokens) for e in examples],
        list(range(len(examples))),
    ):
        counts = Counter(keys)
        fewest = min(counts.values())
        most = rows if fewest <= rows else min(fewest, MOST_HELD_OUT * len(examples))
        small = [key for key, count in counts.items() if count <= most]
        if small and len(counts) > 1:
            break
    count = max(1, rows * len(small) // sum(counts[key] for key in small))
    out = {small[number] for number in spread(len(small), count)}
    sides: tuple[list[Example], list[Example]] = [], []
    for key, example in zip(keys, examples, strict=True):
        sides[key in out].append(example)
    return sides


def without_prompts_of(others: list[Example], examples: list[Example]) -> tuple[list[Example], int]:
    """The examples whose prompt none of the others has, and how many were left out."""
    known = {tuple(e.tokens[: e.start]) for e in others}
    kept = [e for e in examples if tuple(e.tokens[: e.start]) not in known]
    return kept, len(examples) - len(kept)
