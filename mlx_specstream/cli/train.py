"""Train streams for a model on a data folder.

In lossless mode the base stays as it is, and so does its output. In shared mode it is fine-tuned on the
data in the same run, and written to a folder of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..config import PROJECTIONS, StreamConfig
from ..errors import BadArgument
from . import options
from .train_display import ProgressDisplay

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
    mode = parser.add_argument_group("mode")
    mode.add_argument(
        "--mode",
        choices=("lossless", "shared"),
        default="lossless",
        help="lossless: the base is frozen; shared: one LoRA for model and streams fine-tunes it "
        "(default: %(default)s)",
    )
    mode.add_argument(
        "--fused-path", type=Path, metavar="DIR", help="shared: folder for the fine-tuned model"
    )
    mode.add_argument(
        "--dequantize",
        action="store_true",
        help="shared: write a quantised base dequantised, so that nothing learned is rounded off",
    )
    mode.add_argument(
        "--num-layers",
        type=int,
        help="shared: layers that get the LoRA, from the top, the MSA layers among them (default: -1, all)",
    )
    mode.add_argument(
        "--main-sees-streams",
        action="store_true",
        help="shared: the [P] mask, in which the model also attends to its own streams and so needs them",
    )
    target = parser.add_argument_group("targets")
    target.add_argument(
        "--target",
        choices=("hard", "distill"),
        default="hard",
        help="hard: the text; distill: the model's own distributions over it (default: %(default)s)",
    )
    target.add_argument(
        "--alpha",
        type=float,
        nargs="+",
        metavar="A",
        help="weight of each stream in the loss, or one for all (default: 0.8^(j-1); shared: 0.1, beside 1 "
        "of the model's own loss)",
    )
    target.add_argument(
        "--self-distill",
        action="store_true",
        help="let the base answer the prompts itself and train on that",
    )
    target.add_argument(
        "--self-distill-temperature", type=float, help="of its answers (default: 0, greedy)"
    )
    target.add_argument(
        "--self-distill-max-tokens", type=int, help="of one answer (default: 256 tokens)"
    )
    target.add_argument(
        "--self-distill-batch-size", type=int, help="answers made at once (default: 32)"
    )
    target.add_argument(
        "--self-distill-cache",
        type=Path,
        metavar="DIR",
        help="for the answers (default: --streams)",
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
    run_.add_argument("--grad-accumulation-steps", type=int, help="batches per step (default: 1)")
    run_.add_argument(
        "--grad-checkpoint",
        action="store_true",
        help="keep less of each layer for the gradient: less memory, more time",
    )
    run_.add_argument(
        "--cache-hidden",
        type=Path,
        metavar="DIR",
        help="keep what the frozen lower layers make of the data here: less time, much disk",
    )
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
    from ..train.config import FineTune, TrainConfig
    from ..train.session import default_msa_layers, train_streams
    from ..train.shared import Destination
    from ..train.trainer import CHECKPOINT

    names = (
        "iters",
        "minutes",
        "batch_size",
        "hosts",
        "learning_rate",
        "seed",
        "eval_every",
        "save_every",
        "grad_accumulation_steps",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    shared = args.mode == "shared"
    alpha = float(args.lora_rank) if args.lora_alpha is None else args.lora_alpha
    fine_tune = None
    if shared:
        number = -1 if args.num_layers is None else args.num_layers
        fine_tune = FineTune(args.lora_rank, alpha, tuple(args.lora_targets), number)
    elif args.num_layers is not None or args.dequantize:
        name = "dequantize" if args.dequantize else "num_layers"
        raise BadArgument(f"[train] '{name}' is about the fine-tuned model; use --mode shared.")
    config = TrainConfig(
        **given,
        fine_tune=fine_tune,
        target=args.target,
        alphas=args.alpha,
        grad_checkpoint=args.grad_checkpoint,
    )
    self_distill = _self_distill(args, config.seed)
    shape = {
        "num_streams": args.num_streams,
        "lora_rank": 0 if shared else args.lora_rank,  # the fused model has it in its weights
        "lora_alpha": alpha,
        "lora_targets": tuple(args.lora_targets),
        "main_sees_streams": args.main_sees_streams,
        "stream_position": args.stream_position,
        "init_rank": args.init_rank,
        "prune_rank": args.prune_rank,
        "condition_rank": args.condition_rank,
        "value_rotation": args.value_rotation,
    }
    StreamConfig(**shape, msa_layers=args.msa_layers if args.msa_layers is not None else 1)
    folder = model_folder(args.model, args.revision)
    model, tokenizer, base_config = load_base(
        folder,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    layers = args.msa_layers or default_msa_layers(len(model.layers))
    fused = None
    if args.fused_path is not None:
        fused = Destination(args.fused_path, folder, base_config, args.dequantize)
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
                fused=fused,
                self_distill=self_distill,
                cache_hidden=args.cache_hidden,
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
    if fused is not None:
        print(f"{args.fused_path}: the fine-tuned model", file=sys.stderr)


def _self_distill(args: argparse.Namespace, seed: int):
    """How the base is to answer, or None."""
    from ..train.answers import SelfDistill

    prefix = "self_distill_"
    names = ("temperature", "max_tokens", "batch_size", "cache")
    given = {n: getattr(args, prefix + n) for n in names if getattr(args, prefix + n) is not None}
    if args.self_distill:
        return SelfDistill(**given, seed=seed)
    for name in given:
        raise BadArgument(f"[{prefix}{name}] needs --self-distill.")
    return None
