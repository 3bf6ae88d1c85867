"""One training run from a stock model and a data folder to a streams folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import StreamConfig
from ..errors import BadArgument
from ..model.checkpoint import fingerprint, read_description, save_streams
from ..model.projections import embedding_of, weight_shape
from ..model.seams import attach
from ..model.support import ONE_MASK, check_supported
from .answers import SelfDistill, answered
from .config import TrainConfig
from .data import Example, digest, has_split, read_examples
from .estimate import estimate
from .hidden import hidden_states
from .initial import begin_from as take_over
from .initial import new_streams, scale_embeddings
from .shared import Destination, add_lora, fuse, save_fused
from .trainer import CHECKPOINT, Progress, Trainer
from .vocabulary import from_examples

MAX_HELD_OUT = 200  # rows taken from the training data where there is no validation file


def default_msa_layers(num_layers: int) -> int:
    """A quarter of the layers, at most four: more cost a pass more than they bring."""
    return max(1, min(4, num_layers // 4))


def train_streams(
    model: nn.Module,
    tokenizer,
    data: Path,
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
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Train streams for a model and write them to ``out``.

    Lossless mode leaves the model as it is. Shared mode (``config.fine_tune``) trains it, too: it is
    changed in place, written to ``fused``, and the streams belong to it and not to the base.
    A finished streams folder in ``out`` stays as it is until the new run is finished.

    Args:
        data: folder with train.jsonl[.gz] and, if there is one, valid.jsonl[.gz].
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
        report: called after every step; ``note``: called with lines for the user.

    Returns:
        What is stored as ``training`` in streams.json.

    Raises:
        BadData, BadArgument, BadCheckpoint, UnsupportedModel
    """
    _check(model, streams, config, fused, cache_hidden, max_length, draft_vocabulary)
    train, valid = _read(data, tokenizer, max_length, note)
    if self_distill is not None:
        train, valid = (
            answered(model, tokenizer, some, self_distill, out, max_length, note)
            for some in (train, valid)
        )
    mx.random.seed(config.seed)
    base = fingerprint(model)
    main_lora = add_lora(model, config.fine_tune, streams.msa_layers) if config.fine_tune else []
    parameters = new_streams(model, streams)
    if draft_vocabulary:
        parameters.draft_vocabulary, line = from_examples(
            train, draft_vocabulary, tokenizer.eos_token_ids, weight_shape(embedding_of(model))[0]
        )
        note(line)
    seams = attach(model, parameters)
    scale_embeddings(seams, train[: config.batch_size])
    if begin_from is not None:
        note(take_over(begin_from, seams))
    trainer = Trainer(seams, config, out, base, main_lora)
    if resume:
        trainer.resume(digest(train, valid))
        note(f"resumed at step {trainer.iteration}")
    elif (out / CHECKPOINT).exists():
        note(
            f"{out / CHECKPOINT} of an earlier run will be replaced (--resume would go on with it)"
        )
    extra = sum(v.size for _, v in tree_flatten(parameters.parameters()))
    trained = sum(v.size for _, v in tree_flatten(trainer.learner.trainable_parameters()))
    inside = f", {trained - extra:,} in the model's LoRA" if main_lora else ""
    note(
        f"{len(train)} rows to train on, {len(valid)} held out; {extra:,} parameters in the streams"
        f"{inside}"
    )
    if not trained:
        raise BadArgument("[train] nothing to train: no LoRA, no embeddings; use --lora-rank.")
    out.mkdir(parents=True, exist_ok=True)  # an output that cannot be written fails before the run
    if cache_hidden is not None:
        trainer.hidden = hidden_states(seams, train, cache_hidden, base, note)
    with stop_between_steps(trainer):
        if trainer.done < 1.0:
            note(f"{estimate(trainer, train, valid)}")
        trainer.run(train, valid, report)
    about = {
        "mode": config.mode,
        "steps": trainer.iteration,
        "seconds": round(trainer.seconds, 1),
        "config": config.to_json(),
        "parameters": extra,
        "self_distilled": self_distill is not None,
        "began_from": None if begin_from is None else read_description(begin_from)["training"],
        "validation": trainer.history[-1] if trainer.history else None,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-specstream")},
    }
    if fused is not None:
        model = fuse(model, fused.dequantize)
        save_fused(model, tokenizer, fused)
        base = fingerprint(model)
        attach(model, parameters)
    save_streams(out, parameters, base, about)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return about


def _check(
    model: nn.Module,
    streams: StreamConfig,
    config: TrainConfig,
    fused: Destination | None,
    cache_hidden: Path | None,
    max_length: int,
    draft_vocabulary: int,
) -> None:
    """What cannot end well does not begin."""
    check_supported(model)
    layers, fine_tune = len(model.layers), config.fine_tune
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


def _read(data: Path, tokenizer, max_length: int, note) -> tuple[list[Example], list[Example]]:
    train, changed = read_examples(data, "train", tokenizer, max_length)
    if changed:
        note(f"{changed} training rows were cut to {max_length} tokens or left out as too short")
    if has_split(data, "valid"):
        return train, read_examples(data, "valid", tokenizer, max_length)[0]
    if len(train) < 2:
        raise BadArgument(f"[train] {data} has one training row and no validation file; add rows.")
    held_out = min(MAX_HELD_OUT, max(1, len(train) // 20))
    note(f"no valid.jsonl: {held_out} training rows are held out for validation")
    return train[:-held_out], train[-held_out:]
