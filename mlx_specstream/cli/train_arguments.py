"""The options of ``mlx-specstream train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import PROJECTIONS
from ..train.config import ONLY
from ..train.presets import PRESETS, PRUNE_RANK, explained
from . import options


def given(args: argparse.Namespace) -> set[str]:
    """The options of ``train`` that say something else than their defaults do."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    required = {a.dest for a in parser._actions if a.required}
    names = [a.dest for a in parser._actions if a.dest not in {*required, "help"}]
    return {name for name in names if getattr(args, name) != parser.get_default(name)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with train.jsonl and valid.jsonl (or .jsonl.gz): rows with prompt and completion, "
        "messages, or text",
    )
    options.add_template(parser)
    parser.add_argument(
        "--streams",
        type=Path,
        help="streams folder to write (with --only, --from-log and --undo default: the model's own)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"{explained()}. Any option below wins over it (default: default)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --streams; give the other options again (a log must not have grown)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what is wrong with the data and what the run will take, and stop there",
    )
    parser.add_argument(
        "--begin-from",
        type=Path,
        metavar="STREAMS",
        help="begin with the values of a streams folder of this model, as far as they fit (LoRA by its "
        "layer); their shape is the default",
    )
    parser.add_argument(
        "--only",
        choices=ONLY,
        help="train the early-exit head alone, for finished streams: those of --begin-from, or those in "
        "--streams themselves",
    )
    log = parser.add_argument_group("learning from use (lossless streams only)")
    log.add_argument(
        "--from-log",
        type=Path,
        metavar="FILE",
        help="let the streams go on learning from the answers that generate or chat --log kept; those "
        "before stay beside them, and nothing changes unless held-out answers are guessed better",
    )
    log.add_argument(
        "--undo", action="store_true", help="take the last --from-log back; trains nothing"
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
        "--fused-path",
        type=Path,
        metavar="DIR",
        help="shared: folder for the fine-tuned model; a model that is there is replaced",
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
        help="for the answers (default: in the user's cache)",
    )
    run_ = parser.add_argument_group("run")
    run_.add_argument("--iters", type=int, help="steps (default: the preset's)")
    run_.add_argument(
        "--minutes",
        type=float,
        help="train for this long instead of --iters (what is done before the first step is not counted)",
    )
    run_.add_argument("--batch-size", type=int, help="sequences per step (default: the preset's)")
    run_.add_argument(
        "--hosts", type=int, help="positions per sequence that get streams (default: 16)"
    )
    run_.add_argument(
        "--learning-rate",
        type=float,
        help="peak rate of the LoRA (default: 1e-3 up to a hidden size of 384, then falling with its "
        "square root); P_j's follows from it and from the size of the hidden states",
    )
    run_.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop after N validations without progress; in shared mode also take the best (lossless "
        "runs always do) (default: run to the end)",
    )
    run_.add_argument(
        "--max-seq-length",
        type=int,
        help="tokens of a row; longer ones are cut (default: 2048, or what the model reads)",
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
    run_.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="leave tokens per pass and the real decode out of validations",
    )
    run_.add_argument(
        "--eval-every",
        type=int,
        help="steps between validations (default: the preset's; with --minutes as many, evenly in time)",
    )
    run_.add_argument(
        "--save-every",
        type=int,
        help="steps between checkpoints (default: as --eval-every, at most 200)",
    )
    shape = parser.add_argument_group("streams")
    shape.add_argument("--num-streams", type=int, help="gamma (default: the preset's)")
    shape.add_argument("--msa-layers", type=int, help="Ns (default: half of the layers, at most 4)")
    shape.add_argument("--lora-rank", type=int, help="0: none (default: the preset's; shared: 32)")
    shape.add_argument("--lora-alpha", type=float, help="default: the rank")
    shape.add_argument("--lora-targets", nargs="+", choices=PROJECTIONS, help="default: all")
    shape.add_argument(
        "--stream-position", choices=("t+j", "t"), help="rope position of stream j (default: t+j)"
    )
    shape.add_argument(
        "--init-rank", type=int, help="rank of f in S = f(M) + P; 0: identity (default: 0)"
    )
    shape.add_argument(
        "--prune-rank",
        type=int,
        help=f"rank of an early-exit head for pruning; 0: none (default: 0; with --only pruning "
        f"{PRUNE_RANK})",
    )
    shape.add_argument(
        "--condition-rank",
        type=int,
        help="rank of the map that corrects a guess by the token before it; 0: none (default: the "
        "preset's; shared: 0)",
    )
    shape.add_argument(
        "--condition-shared",
        action=argparse.BooleanOptionalAction,
        help="one such map for all streams, or one each (default: one for all; with --begin-from as "
        "there, where that fits)",
    )
    shape.add_argument(
        "--root-rank",
        type=int,
        help="rank of the map that tells all streams, where they begin, which token was chosen before "
        "them; such streams are never inline; 0: none (default: the preset's; shared: 0)",
    )
    shape.add_argument(
        "--value-rotation",
        type=float,
        help="epsilon; replaces the stream embeddings (default: 0)",
    )
    shape.add_argument(
        "--draft-vocabulary",
        type=int,
        default=0,
        metavar="N",
        help="draft only the N most frequent tokens of the completions, end of sequence besides; training "
        "still uses them all (default: 0, the whole vocabulary)",
    )
