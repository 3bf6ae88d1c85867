"""Streams that go on learning from a log of answers (``train --from-log``), and the way back."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from ..errors import BadArgument, BadCheckpoint
from ..train.presets import PRESETS, learning_rate
from .train_arguments import given

SHARE = 0.3  # of the usual learning rate: the streams are trained already
ROUNDS, MOST = 3, 2000  # times through the log, and steps at most
LOOKS = 8  # validations
PATIENCE = 3  # of them
OF_UNDO = {
    "undo",
    "streams",
    "adapter_path",
    "revision",
    "trust_remote_code",
}  # the options it takes
NOT_HERE = {  # beside --from-log
    "data", "begin_from", "only", "main_sees_streams", "fused_path", "num_layers", "dequantize", "preset",
    "ignore_chat_template", "self_distill", "self_distill_temperature", "self_distill_max_tokens",
    "self_distill_batch_size", "self_distill_cache",
}  # fmt: skip


def streams_of(model_folder: Path) -> Path:
    """The streams that lie inside a model folder."""
    from ..model.checkpoint import find_streams

    found = find_streams(model_folder)
    if found is None:
        raise BadArgument(f"[train] {model_folder} has no streams in it; name some with --streams.")
    return found


def take_back(args: argparse.Namespace) -> None:
    """Undo the last run from a log."""
    from ..load import model_folder
    from ..train.online import undo

    for name in sorted(given(args) - OF_UNDO):
        raise BadArgument(f"[undo] takes a run back and trains nothing; leave '{name}' out.")
    folder = args.streams or streams_of(
        model_folder(args.model, args.revision, args.trust_remote_code)
    )
    undo(folder)
    print(f"{folder}: as before the last --from-log", file=sys.stderr)


def learn(args: argparse.Namespace) -> None:
    """Train on the log, in ``online`` beside the streams; put the result in use if it is better."""
    from ..load import load_base, model_folder
    from ..measure.rehearsal import Rehearsal
    from ..model.checkpoint import read_description
    from ..model.projections import hidden_size
    from ..train.identity import identity
    from ..train.log import read_log
    from ..train.online import WORK, adopt
    from ..train.session import train_streams
    from . import train

    for name in sorted(given(args) & NOT_HERE):
        raise BadArgument(f"[{name}] has no place beside --from-log.")
    if args.mode == "shared":
        raise BadArgument("[mode] shared would change the model; --from-log trains streams alone.")
    folder = model_folder(args.model, args.revision, args.trust_remote_code)
    streams = args.streams or streams_of(folder)
    work = streams / WORK
    shape = train.stream_config(args, PRESETS["default"], 1, streams)
    known = read_description(streams)["config"]
    for name in train.SHAPE:
        if getattr(shape, name) != getattr(known, name):
            raise BadArgument(
                f"[{name}] must stay {getattr(known, name)} with --from-log, got {getattr(shape, name)}: "
                "other streams would have to be trained anew."
            )
    if shape.main_sees_streams:
        raise BadCheckpoint(
            f"[train] the model sees its streams in {streams}: training them would change what it says."
        )
    model, tokenizer, base_config = load_base(
        folder, adapter_path=args.adapter_path, trust_remote_code=args.trust_remote_code
    )
    data = read_log(args.from_log, identity(model), train.max_length(args, base_config))
    preset = PRESETS["default"]
    size = args.batch_size or preset.batch_size
    iters = args.iters or max(LOOKS, min(MOST, ROUNDS * len(data.train) // size))
    defaults = {
        "iters": iters,
        "eval_every": max(1, iters // LOOKS),
        "validations": LOOKS,
        "patience": PATIENCE,
        "learning_rate": SHARE * learning_rate(hidden_size(model)),
        **train.batches(preset, model.model_type),
    }
    config = train.train_config(args, preset, hidden_size(model), **defaults)

    def go_on(note, **how):
        for report in data.reports:
            note("\n".join(report.lines()))
        return train_streams(
            model,
            tokenizer,
            data,
            work,
            shape,
            config,
            begin_from=streams,
            cache_hidden=args.cache_hidden,
            draft_vocabulary=args.draft_vocabulary,
            look=None if args.no_rehearsal else Rehearsal(tokenizer),
            note=note,
            **how,
        )

    about = train.show(args, work, go_on)
    if args.dry_run:
        return
    if about["taken"] == 0:
        shutil.rmtree(work)
        print(f"{streams}: held-out answers were not guessed better; as before", file=sys.stderr)
        return
    adopt(streams)
    print(
        f"{streams}: {about['steps']} steps on {len(data.train)} answers; --undo takes them back",
        file=sys.stderr,
    )
