"""Arguments that several commands share: the model, its streams, sampling, the draft."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import BadArgument

# what configs of models call it
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="model folder, or hub id (owner/name)")
    group.add_argument("--adapter-path", help="folder of mlx-lm LoRA adapters")
    group.add_argument("--revision", help="hub revision")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="let the repository's own code run"
    )


def add_streams(parser: argparse.ArgumentParser, trees: str = "store") -> None:
    """``trees``: argparse's action of --tree, "append" where several are compared."""
    group = parser.add_argument_group("streams")
    group.add_argument(
        "--streams", help="streams folder (default: the one inside the model folder)"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="use streams trained on another base (slower, same text)",
    )
    group.add_argument("--no-streams", action="store_true", help="decode plainly")
    group.add_argument(
        "--tree",
        action=trees,
        help="chain, cartesian:K or best:M for every pass (default: planned as it goes)",
    )
    group.add_argument(
        "--placement",
        choices=("inline", "deferred"),
        help="where streams run; those with a root rank are deferred (default: chosen for you)",
    )
    group.add_argument(
        "--copies",
        action=argparse.BooleanOptionalAction,
        help="draft from the prompt and the text so far, too; needs no streams "
        "(default: with streams, unless --tree is given)",
    )
    group.add_argument(
        "--guard",
        type=float,
        default=0.0,
        help="leave choices between logits closer than this to a pass of one row (default: off)",
    )
    group.add_argument("--prune-keep", type=int, help="keep this many nodes at the early exit")
    group.add_argument(
        "--prune-threshold",
        type=float,
        help="drop sub-trees below this probability at the early exit",
    )


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int, seed: int | None = None) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=max_tokens,
        help="-1: no limit (default: %(default)s)",
    )
    group.add_argument("--temp", type=float, default=0.0, help="temperature (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="nucleus (default: %(default)s)")
    group.add_argument("--min-p", type=float, default=0.0, help="default: %(default)s")
    group.add_argument("--top-k", type=int, default=0, help="default: %(default)s (off)")
    default = "a new one every time" if seed is None else seed
    group.add_argument(
        "--seed", type=int, default=seed, help=f"of the sampler (default: {default})"
    )


def add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="keep prompts and answers (token ids) in this file, for train --from-log; it stays on this "
        "machine, readable by you alone (default: nothing is kept)",
    )


def answer_log(args: argparse.Namespace, model):
    """The log that --log names, or None."""
    if args.log is None:
        return None
    from ..train.identity import identity
    from ..train.log import AnswerLog

    return AnswerLog(args.log, identity(model))


def load_model(args: argparse.Namespace):
    """(model, tokenizer) as the arguments say."""
    from ..load import load

    model, tokenizer = load(
        args.model,
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        streams=False if args.no_streams else args.streams,
        force=args.force,
    )
    for token in getattr(args, "extra_eos_token", None) or []:
        tokenizer.add_eos_token(token)
    return model, tokenizer


def context_of(config: Any) -> int | None:
    """Tokens that the model was made for, as its config says; takes a model of mlx-lm's, too."""
    if hasattr(config, "args"):
        config = vars(config.args)
    for part in (config, config.get("text_config") or {}):
        for name in CONTEXT_NAMES:
            if isinstance(part.get(name), int):
                return part[name]
    return None


def draft_model(path: str | None, tokenizer):
    """The model that drafts for mlx-lm's speculative decoding; raises BadArgument if it cannot."""
    if not path:
        return None
    from ..load import load_base, model_folder

    model, other, _ = load_base(model_folder(path))
    if other.vocab_size != tokenizer.vocab_size:
        raise BadArgument(
            f"[draft_model] must have the model's {tokenizer.vocab_size} tokens; it has "
            f"{other.vocab_size}."
        )
    return model


def generation_arguments(args: argparse.Namespace) -> dict:
    """Keyword arguments of ``stream_generate`` for streams and sampling."""
    from ..decode.choose import make_sampler
    from ..decode.prune import PruneRule
    from ..decode.tree import TreeShape
    from ..generate import check_max_tokens

    for name, ok, rule in (
        ("temp", args.temp >= 0, ">= 0"),
        ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
        ("min_p", 0 <= args.min_p <= 1, "in [0, 1]"),
        ("top_k", args.top_k >= 0, ">= 0"),
        ("guard", args.guard >= 0, ">= 0"),
    ):
        if not ok:
            raise BadArgument(f"[{name}] must be {rule}, got {getattr(args, name)}.")
    if args.tree is not None:
        TreeShape.parse(args.tree)
    prune = None
    if args.prune_keep is not None or args.prune_threshold is not None:
        prune = PruneRule(args.prune_keep, args.prune_threshold)
    return {
        "max_tokens": check_max_tokens(args.max_tokens),
        "sampler": make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
        "seed": args.seed,
        "use_streams": not args.no_streams,
        "tree": args.tree,
        "placement": args.placement,
        "copies": args.copies,
        "guard": args.guard,
        "prune": prune,
    }


def add_template(parser) -> None:
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="feed prompts as they are, for a model that is used with generate --ignore-chat-template; rows "
        "must not be messages",
    )


def templates(args: argparse.Namespace, tokenizer) -> None:
    """Let the rows of data be encoded without the chat template, where that is asked for."""
    if args.ignore_chat_template:
        tokenizer.has_chat_template = False


def chat_tokens(tokenizer, messages: list[dict], tools: list | None = None) -> list[int]:
    """The prompt that the chat template makes of messages; its own complaints are one line."""

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise jinja2's errors, tokenizers TypeError on bad text
        line = " ".join(str(error).split())
        raise BadArgument(f"[chat template] refuses these messages: {line[:300]}") from None


def planner_note(seams) -> list[str]:
    """A line for results whose planner had no measured costs, or none."""
    from ..decode.costs_here import costs_for

    if costs_for(seams).measured:
        return []
    return ["the planner guessed what passes cost: mlx-specstream tune had not measured it"]


def check_output(name: str, path: Path | None) -> None:
    """A file that is to be written at the end: what is wrong with it is said at the beginning."""

    if path is None:
        return
    folder = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadArgument(f"[{name}] {path} cannot be written.")


def settings(args: argparse.Namespace) -> dict:
    """The settings of a run, for its results; of files and folders the name only."""
    skipped = ("command", "debug", "version", "json", "html", "tune", "model")
    found = {k: v for k, v in vars(args).items() if k not in skipped}
    for name in ("streams", "adapter_path", "draft_model", "data"):
        if found.get(name) is not None:
            found[name] = shown_name(str(found[name]))
    return found


def shown_name(path: str) -> str:
    """Of a folder its last part, as a report should not tell where it lay; a hub id as it is."""
    return Path(path).resolve().name if Path(path).exists() else path
