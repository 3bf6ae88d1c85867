"""Train streams for a model on a data folder. The base stays as it is, and so does its output."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config import PROJECTIONS, StreamConfig
from . import options

HELP = "train streams for a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with train.jsonl and valid.jsonl (or .jsonl.gz): rows with prompt and completion, "
        "messages, or text",
    )
    parser.add_argument("--streams", type=Path, required=True, help="streams folder to write")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --streams"
    )
    parser.add_argument(
        "--begin-from",
        type=Path,
        metavar="STREAMS",
        help="begin with the values of a streams folder of this model, as far as they fit",
    )
    run_ = parser.add_argument_group("run")
    run_.add_argument("--iters", type=int, help="steps (default: 3000)")
    run_.add_argument("--minutes", type=float, help="train for this long instead of --iters")
    run_.add_argument("--batch-size", type=int, help="sequences per step (default: 4)")
    run_.add_argument(
        "--hosts", type=int, help="positions per sequence that get streams (default: 16)"
    )
    run_.add_argument("--learning-rate", type=float, help="peak rate of the LoRA (default: 1e-3)")
    run_.add_argument(
        "--max-seq-length", type=int, default=2048, help="default: %(default)s tokens"
    )
    run_.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    run_.add_argument("--eval-every", type=int, help="steps between validations (default: 200)")
    run_.add_argument("--save-every", type=int, help="steps between checkpoints (default: 200)")
    shape = parser.add_argument_group("streams")
    shape.add_argument(
        "--num-streams",
        type=int,
        default=StreamConfig.num_streams,
        help="gamma (default: %(default)s)",
    )
    shape.add_argument(
        "--msa-layers", type=int, help="Ns (default: a quarter of the layers, at most 4)"
    )
    shape.add_argument(
        "--lora-rank",
        type=int,
        default=StreamConfig.lora_rank,
        help="default: %(default)s; 0: none",
    )
    shape.add_argument("--lora-alpha", type=float, help="default: the rank")
    shape.add_argument(
        "--lora-targets", nargs="+", choices=PROJECTIONS, default=PROJECTIONS, help="default: all"
    )
    shape.add_argument(
        "--stream-position", choices=("t+j", "t"), default="t+j", help="rope position of stream j"
    )
    shape.add_argument(
        "--init-rank", type=int, default=0, help="rank of f in S = f(M) + P; 0: identity"
    )
    shape.add_argument(
        "--prune-rank", type=int, default=0, help="rank of an early-exit head for pruning; 0: none"
    )
    shape.add_argument(
        "--condition-rank",
        type=int,
        default=0,
        help="rank of the map that corrects a guess by the token before it; 0: none",
    )
    shape.add_argument(
        "--value-rotation", type=float, default=0.0, help="epsilon; replaces the stream embeddings"
    )
    shape.add_argument(
        "--draft-vocabulary",
        type=int,
        default=0,
        metavar="N",
        help="draft only the N most frequent tokens of the completions, end of sequence besides; training "
        "still uses them all (default: 0, the whole vocabulary)",
    )


def run(args: argparse.Namespace) -> None:
    from ..load import load_base, model_folder
    from ..train.session import default_msa_layers, train_streams
    from ..train.trainer import CHECKPOINT, TrainConfig

    names = (
        "iters",
        "minutes",
        "batch_size",
        "hosts",
        "learning_rate",
        "seed",
        "eval_every",
        "save_every",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = TrainConfig(**given)
    shape = {
        "num_streams": args.num_streams,
        "lora_rank": args.lora_rank,
        "lora_alpha": float(args.lora_rank) if args.lora_alpha is None else args.lora_alpha,
        "lora_targets": tuple(args.lora_targets),
        "stream_position": args.stream_position,
        "init_rank": args.init_rank,
        "prune_rank": args.prune_rank,
        "condition_rank": args.condition_rank,
        "value_rotation": args.value_rotation,
    }
    StreamConfig(**shape, msa_layers=args.msa_layers if args.msa_layers is not None else 1)
    model, tokenizer, _ = load_base(
        model_folder(args.model, args.revision),
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    layers = args.msa_layers or default_msa_layers(len(model.layers))
    streams = StreamConfig(**shape, msa_layers=layers)
    with ProgressDisplay() as display:
        try:
            about = train_streams(
                model,
                tokenizer,
                args.data,
                args.streams,
                streams,
                config,
                max_length=args.max_seq_length,
                draft_vocabulary=args.draft_vocabulary,
                resume=args.resume,
                begin_from=args.begin_from,
                report=display.step,
                note=display.note,
            )
        except KeyboardInterrupt:
            if (args.streams / CHECKPOINT).exists():
                display.note(f"stopped; go on with --resume (checkpoint in {args.streams})")
            raise
    print(f"{args.streams}: {about['steps']} steps in {about['seconds']:.0f} s", file=sys.stderr)


class ProgressDisplay:
    """A bar with time left and losses, and a line per validation, on stderr."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left, loss {task.fields[loss]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("train", total=1.0, step=0, left="?", loss="-")
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, progress) -> None:
        seconds = progress.seconds * (1 - progress.done) / max(progress.done, 1e-9)
        left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        loss = " ".join(f"{x:.2f}" for x in progress.losses)
        self.bar.update(
            self.task, completed=progress.done, step=progress.iteration, left=left, loss=loss
        )
        if progress.validation is not None:
            columns = (
                f"{name} " + " ".join(f"{x:.3f}" for x in progress.validation[key])
                for name, key in (("loss", "loss"), ("top-1", "top1"), ("top-4", "topk"))
            )
            self.note(f"step {progress.iteration}: validation per stream: " + "; ".join(columns))
