"""One training run from a stock model and a data folder to a streams folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..config import StreamConfig
from ..errors import BadArgument
from ..model.checkpoint import fingerprint, load_streams, read_description, save_streams
from ..model.projections import embedding_of, weight_shape
from ..model.seams import Seams, attach, stream_shapes
from ..model.streams import Streams
from ..model.support import ONE_MASK, check_supported
from .data import Example, has_split, make_batch, read_examples
from .loss import base_pass
from .trainer import CHECKPOINT, Progress, TrainConfig, Trainer
from .vocabulary import from_examples

EMBEDDING_SHARE = 0.05  # initial P_j against the RMS of the hidden states they are added to
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
    max_length: int = 2048,
    draft_vocabulary: int = 0,
    resume: bool = False,
    begin_from: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Train streams for a frozen model and write them to ``out``.

    A finished streams folder in ``out`` stays as it is until the new run is finished.

    Args:
        data: folder with train.jsonl[.gz] and, if there is one, valid.jsonl[.gz].
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
    check_supported(model)
    if streams.main_sees_streams:
        raise BadArgument(
            "[train] main_sees_streams changes the base's output; lossless training cannot."
        )
    if streams.msa_layers > len(model.layers):
        raise BadArgument(
            f"[train] 'msa_layers' must be at most the model's {len(model.layers)} layers, "
            f"got {streams.msa_layers}."
        )
    if model.model_type in ONE_MASK and config.batch_size > 1:
        raise BadArgument(
            f"[train] 'batch_size' must be 1 for {model.model_type}, whose attention takes one mask per "
            f"batch; got {config.batch_size}."
        )
    if max_length < 3:
        raise BadArgument(f"[train] 'max_seq_length' must be >= 3 tokens, got {max_length}.")
    if draft_vocabulary < 0:
        raise BadArgument(f"[train] 'draft_vocabulary' must be >= 0, got {draft_vocabulary}.")
    train, valid = _read(data, tokenizer, max_length, note)
    mx.random.seed(config.seed)
    base = fingerprint(model)
    parameters = _new_streams(model, streams)
    if draft_vocabulary:
        parameters.draft_vocabulary, line = from_examples(
            train, draft_vocabulary, tokenizer.eos_token_ids, weight_shape(embedding_of(model))[0]
        )
        note(line)
    seams = attach(model, parameters)
    _scale_embeddings(seams, train[: config.batch_size])
    if begin_from is not None:
        note(_begin_from(begin_from, seams))
    trainer = Trainer(seams, config, out, base)
    if resume:
        trainer.resume()
        note(f"resumed at step {trainer.iteration}")
    elif (out / CHECKPOINT).exists():
        note(
            f"{out / CHECKPOINT} of an earlier run will be replaced (--resume would go on with it)"
        )
    extra = sum(v.size for _, v in tree_flatten(seams.streams.parameters()))
    note(
        f"{len(train)} rows to train on, {len(valid)} held out; {extra:,} parameters in the streams"
    )
    if not extra:
        raise BadArgument("[train] nothing to train: no LoRA, no embeddings; use --lora-rank.")
    out.mkdir(parents=True, exist_ok=True)  # an output that cannot be written fails before the run
    with stop_between_steps(trainer):
        trainer.run(train, valid, report)
    about = {
        "mode": "lossless",
        "steps": trainer.iteration,
        "seconds": round(trainer.seconds, 1),
        "config": asdict(config),
        "parameters": extra,
        "began_from": None if begin_from is None else read_description(begin_from)["training"],
        "validation": trainer.history[-1] if trainer.history else None,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-specstream")},
    }
    save_streams(out, seams.streams, base, about)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return about


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


def _new_streams(model: nn.Module, config: StreamConfig) -> Streams:
    shapes = stream_shapes(model, config)
    if config.lora_rank and not any(shapes):
        raise BadArgument(
            f"[train] none of {', '.join(config.lora_targets)} is a projection of this model; "
            "choose other --lora-targets."
        )
    return Streams(config, weight_shape(embedding_of(model))[1], shapes, embedding_scale=1.0)


def _begin_from(folder: Path, seams: Seams) -> str:
    """Take over what fits of the streams in ``folder``; returns a line for the user."""
    own = dict(tree_flatten(seams.streams.parameters()))
    theirs = tree_flatten(load_streams(folder, seams.model)[0].parameters())
    taken = [(name, x) for name, x in theirs if name in own and own[name].shape == x.shape]
    if not taken:
        raise BadArgument(
            f"[train] nothing of the streams in {folder} fits these; train with their --lora-rank, "
            "--msa-layers and --num-streams."
        )
    seams.streams.load_weights(taken, strict=False)
    mx.eval(seams.streams.parameters())
    return f"{len(taken)} of {len(own)} arrays begin as in {folder}"


def _scale_embeddings(seams: Seams, examples: list[Example]) -> None:
    """Make the initial P_j small against the hidden states they are added to."""
    if seams.streams.config.value_rotation:
        return
    batch = make_batch(examples, [np.array(e.hosts()[:1]) for e in examples], 1)
    hidden, _ = base_pass(seams, mx.array(batch.tokens))
    rms = mx.sqrt(mx.mean(mx.square(hidden.astype(mx.float32))))
    seams.streams.embeddings = EMBEDDING_SHARE * rms * seams.streams.embeddings
    mx.eval(seams.streams.parameters())
