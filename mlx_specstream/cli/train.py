"""Train streams for a model on a data folder.

In lossless mode the base stays as it is, and so does its output. In shared mode it is fine-tuned on the
data in the same run, and written to a folder of its own. The streams folder also gets train.json and
train.svg, the numbers and the curves of the run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import StreamConfig
from ..errors import BadArgument
from ..train.presets import PRESETS, PRUNE_RANK, every, learning_rate, msa_layers
from . import options, train_online
from .train_arguments import add_arguments as add_arguments
from .train_display import ProgressDisplay

HELP = "train streams for a model"
MAX_LENGTH = 2048  # tokens of a row
SAVE_EVERY = 200  # steps at most: what a crash may cost
SHAPE = tuple(f.name for f in fields(StreamConfig))
RUN = (
    "iters", "minutes", "batch_size", "hosts", "learning_rate", "seed", "eval_every", "save_every",
    "grad_accumulation_steps", "patience",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.undo:
        return train_online.take_back(args)
    if args.from_log is not None:
        return train_online.learn(args)
    for name in ("data", "streams"):
        if getattr(args, name) is None and not (name == "streams" and args.only):
            raise BadArgument(f"[train] name a folder with --{name}.")
    from ..load import load_base, model_folder
    from ..measure.rehearsal import Rehearsal
    from ..model.projections import hidden_size
    from ..train.session import train_streams
    from ..train.shared import Destination

    preset = PRESETS[args.preset or "default"]
    shared = args.mode == "shared"
    if not shared and (args.num_layers is not None or args.dequantize):
        name = "dequantize" if args.dequantize else "num_layers"
        raise BadArgument(f"[train] '{name}' is about the fine-tuned model; use --mode shared.")
    train_config(args, preset, 1)  # what can be said before a model is loaded
    self_distill = _self_distill(args)
    folder = model_folder(args.model, args.revision, args.trust_remote_code)
    out = args.streams or train_online.streams_of(folder)
    begin_from = args.begin_from or (out if args.only else None)
    stream_config(args, preset, 1, begin_from)
    model, tokenizer, base_config = load_base(
        folder,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    options.templates(args, tokenizer)
    fused = None
    if args.fused_path is not None:
        fused = Destination(args.fused_path, folder, base_config, args.dequantize)
    about = show(
        args,
        out,
        lambda **how: train_streams(
            model,
            tokenizer,
            args.data,
            out,
            stream_config(args, preset, len(model.layers), begin_from),
            train_config(args, preset, hidden_size(model), **batches(preset, model.model_type)),
            fused=fused,
            self_distill=self_distill,
            cache_hidden=args.cache_hidden,
            max_length=max_length(args, base_config),
            draft_vocabulary=args.draft_vocabulary,
            begin_from=begin_from,
            look=None if args.no_rehearsal or args.only else Rehearsal(tokenizer, changes=shared),
            **how,
        ),
    )
    if args.dry_run:
        return
    print(f"{out}: {about['steps']} steps in {about['seconds']:.0f} s", file=sys.stderr)
    print("mlx-specstream tune measures what passes with such streams cost", file=sys.stderr)
    if fused is not None:
        print(f"{args.fused_path}: the fine-tuned model", file=sys.stderr)


def show(args: argparse.Namespace, out: Path, train) -> dict[str, Any]:
    """Run ``train`` with a display, curves beside every checkpoint, and a word on how to go on."""
    from ..files import write_text
    from ..measure.curves import curves
    from ..train.record import CURVES
    from ..train.trainer import CHECKPOINT

    with ProgressDisplay() as display:
        try:
            return train(
                resume=args.resume,
                dry_run=args.dry_run,
                report=display.step,
                note=display.note,
                saved=lambda about: write_text(out / CURVES, curves(about)),
            )
        except KeyboardInterrupt:
            if (out / CHECKPOINT).exists():
                display.note(f"stopped; go on with --resume (checkpoint in {out})")
            raise


def stream_config(
    args: argparse.Namespace, preset, layers: int, begin_from: Path | None
) -> StreamConfig:
    """The shape of the streams: what is given, else that of the streams to begin from, else the preset's.

    Args:
        layers: of the model; 1 where it is not known yet (only the rules are checked then).
    """
    from ..model.checkpoint import read_description

    shared = args.mode == "shared"
    given = {n: getattr(args, n) for n in SHAPE if getattr(args, n) is not None}
    if begin_from is not None:
        found = read_description(begin_from)["config"].to_json()
        if args.only:
            found["prune_rank"] = found["prune_rank"] or PRUNE_RANK
            if set(given) - {"prune_rank", "main_sees_streams"}:
                name = min(set(given) - {"prune_rank", "main_sees_streams"})
                raise BadArgument(
                    f"[train] '{name}' cannot change with --only: the streams stay as they are."
                )
    else:
        found = {
            "num_streams": preset.num_streams,
            "msa_layers": msa_layers(layers),
            "lora_rank": preset.lora_rank,
            "condition_rank": 0 if shared else preset.condition_rank,
            "root_rank": 0 if shared or args.main_sees_streams else preset.root_rank,
        }
    if not args.main_sees_streams and begin_from is not None:
        given.pop("main_sees_streams")
    fits = begin_from is not None and all(
        given.get(name, found[name]) == found[name] for name in ("condition_rank", "num_streams")
    )
    # What is there to begin from says so if it has one map; a map each is kept only where it fits.
    found = {"condition_shared": not fits, **found, **given}
    if not found["condition_rank"]:
        found["condition_shared"] = given.get("condition_shared", False)
    if "lora_alpha" not in given and ("lora_rank" in given or "lora_alpha" not in found):
        found["lora_alpha"] = float(found["lora_rank"])
    if shared:
        found["lora_rank"] = 0  # the fused model has it in its weights
    return StreamConfig(**found)


def max_length(args: argparse.Namespace, base_config: dict) -> int:
    """Tokens of a row, at most: no more than the model reads."""
    context = options.context_of(base_config)
    if args.max_seq_length is None:
        return min(MAX_LENGTH, context or MAX_LENGTH)
    if context is not None and args.max_seq_length > context:
        raise BadArgument(
            f"[max_seq_length] must be at most the {context} tokens that the model reads, got "
            f"{args.max_seq_length}."
        )
    return args.max_seq_length


def batches(preset, model_type: str) -> dict[str, int]:
    """The preset's rows of a step, one after the other where a model takes one mask per batch."""
    from ..model.support import ONE_MASK

    if model_type in ONE_MASK:
        return {"batch_size": 1, "grad_accumulation_steps": preset.batch_size}
    return {"batch_size": preset.batch_size}


def train_config(args: argparse.Namespace, preset, width: int, **defaults: Any):
    """How to train: what is given, else ``defaults``, else the preset's and what follows from the width."""
    from ..train.config import FineTune, TrainConfig

    given = {name: getattr(args, name) for name in RUN if getattr(args, name) is not None}
    fine_tune = None
    if args.mode == "shared":
        rank = FineTune.rank if args.lora_rank is None else args.lora_rank
        alpha = float(rank) if args.lora_alpha is None else args.lora_alpha
        number = -1 if args.num_layers is None else args.num_layers
        targets = {} if args.lora_targets is None else {"targets": tuple(args.lora_targets)}
        fine_tune = FineTune(rank, alpha, num_layers=number, **targets)
    found = {
        "iters": preset.iters,
        "batch_size": preset.batch_size,
        "learning_rate": learning_rate(width),
        **defaults,
        **given,
    }
    if {"iters", "minutes"} <= given.keys():
        raise BadArgument("[train] a run has --iters steps or --minutes of time, not both.")
    if "minutes" in given:
        found["eval_every"] = given.get("eval_every")
        found.setdefault("validations", preset.validations)
    elif found["iters"] > 0:
        found.setdefault("eval_every", every(found["iters"], preset.validations))
    found.setdefault("save_every", min(found.get("eval_every") or SAVE_EVERY, SAVE_EVERY))
    return TrainConfig(
        **found,
        fine_tune=fine_tune,
        target=args.target,
        alphas=args.alpha,
        only=args.only,
        grad_checkpoint=args.grad_checkpoint,
    )


def _self_distill(args: argparse.Namespace):
    """How the base is to answer, or None."""
    from ..train.answers import SelfDistill

    prefix = "self_distill_"
    names = ("temperature", "max_tokens", "batch_size", "cache")
    given = {n: getattr(args, prefix + n) for n in names if getattr(args, prefix + n) is not None}
    if args.self_distill:
        return SelfDistill(**given, seed=args.seed)
    for name in given:
        raise BadArgument(f"[{prefix}{name}] needs --self-distill.")
    return None
