"""Compare mlx-lm, plain decoding, streams and copied drafts on this machine, in one interleaved run.

Greedy; the baseline is mlx_lm.stream_generate on a model of its own. The tables go to stdout, the
progress to stderr. Nothing written holds text of a prompt or an answer, nor token ids of your own
prompts (--data) and their answers.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from ..errors import BadArgument, UnsupportedModel
from . import options, show

HELP = "compare the speed with mlx-lm's"
SLACK = 64  # tokens of the context left free beside prompt and answer: the nodes of a draft
LEAST_ROOM = 16  # tokens; a smaller prompt says nothing
SPLIT = "valid"  # of a folder of data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--share-weights",
        action="store_true",
        help="baseline and ours use the same arrays, where memory cannot hold the weights twice",
    )
    how = parser.add_argument_group("streams")
    how.add_argument("--streams", help="streams folder (default: the one inside the model folder)")
    how.add_argument("--force", action="store_true", help="use streams trained on another base")
    how.add_argument("--no-streams", action="store_true", help="leave streams out")
    how.add_argument("--tree", help="chain, cartesian:K or best:M (default: the planner chooses)")
    how.add_argument("--placement", choices=("inline", "deferred"), help="where streams run")
    draft = parser.add_argument_group("mlx-lm's speculative decoding")
    draft.add_argument("--draft-model", help="compare it with this draft model, too")
    draft.add_argument("--num-draft-tokens", type=int, help="tokens per draft (default: mlx-lm's)")
    what = parser.add_argument_group("prompts")
    what.add_argument(
        "--kinds",
        nargs="*",
        help="of our own: prose, code, json-sql, long (default: all; with --data: none)",
    )
    what.add_argument(
        "--data",
        type=Path,
        help="your own: jsonl rows with prompt, messages or text (may end in .gz), or a folder with "
        "valid.jsonl",
    )
    what.add_argument(
        "--prompts", type=int, help="at most so many of each kind (default: all; of --data 20)"
    )
    what.add_argument("--ignore-chat-template", action="store_true", help="feed them as they are")
    what.add_argument(
        "--max-tokens", "-m", type=int, default=128, help="of an answer (default: %(default)s)"
    )
    what.add_argument(
        "--repeats", type=int, default=3, help="timed, after a warm-up (default: %(default)s)"
    )
    out = parser.add_argument_group("reports")
    out.add_argument("--json", type=Path, metavar="FILE", help="raw results")
    out.add_argument("--html", type=Path, metavar="FILE", help="one page to read and to share")
    out.add_argument(
        "--tune", type=Path, metavar="FILE", help="put in what mlx-specstream tune measured (JSON)"
    )


def run(args: argparse.Namespace) -> None:
    _check(args)
    from ..decode.plan import make_plan
    from ..files import write_text
    from ..measure.bench import about_model, collect, make_modes
    from ..measure.report import page, read_tune
    from ..measure.tables import every_table
    from ..measure.warm import warm_up

    tune = None if args.tune is None else read_tune(args.tune)
    model, tokenizer = options.load_model(args)
    notes: list[str] = []
    seams = _seams(model, notes)
    streams = seams is not None and seams.streams is not None
    if not streams and (args.tree or args.placement):
        name = "tree" if args.tree else "placement"
        raise BadArgument(f"[{name}] needs streams; load some, or do not set it.")
    if streams:  # a plan that cannot be made is said now, not after the first answers
        make_plan(seams.streams.config, args.tree or "chain", args.placement)
    if args.share_weights:
        notes.append("baseline and ours shared one copy of the weights")
    stock, config = _stock(args, model)
    context = options.context_of(config)
    prompts = _prompts(args, tokenizer, context, notes)
    keywords = {"tree": args.tree, "placement": args.placement}
    modes = make_modes(
        stock,
        model,
        tokenizer,
        max_tokens=args.max_tokens,
        streams=streams,
        copies=seams is not None,
        draft_model=options.draft_model(args.draft_model, tokenizer),
        num_draft_tokens=args.num_draft_tokens,
        keywords={name: value for name, value in keywords.items() if value is not None},
    )
    if seams is not None:
        warm_up(model, tokenizer)
    with show.Progress("answers") as progress:
        results = collect(
            modes,
            prompts,
            args.repeats,
            arguments=options.settings(args),
            model=about_model(options.shown_name(args.model), stock, seams, context),
            tune=tune,
            notes=notes,
            progress=progress.step,
        )
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")
    if args.html:
        write_text(args.html, page([results]))
    show.print_tables(results, every_table(results))


def _check(args: argparse.Namespace) -> None:
    """What can be said before a model is loaded."""
    from ..train.data import data_file

    for name, least in (("repeats", 1), ("prompts", 1), ("max_tokens", 2), ("num_draft_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadArgument(f"[{name}] must be at least {least}; got {value}.")
    if args.num_draft_tokens is not None and not args.draft_model:
        raise BadArgument("[num_draft_tokens] needs --draft-model.")
    if args.data is not None:
        data_file(args.data, SPLIT)
    for name in ("json", "html"):
        options.check_output(name, getattr(args, name))
    if args.json is not None and args.json == args.html:
        raise BadArgument(f"[json] and [html] must be two files; got {args.json} for both.")


def _stock(args: argparse.Namespace, model):
    """(a model of its own for mlx-lm, its config)."""
    from ..load import load_base, model_folder

    stock, _, config = load_base(
        model_folder(args.model, args.revision, args.trust_remote_code),
        adapter_path=args.adapter_path,
        lazy=args.share_weights,
        trust_remote_code=args.trust_remote_code,
    )
    if args.share_weights:
        stock.update(model.parameters())
    return stock, config


def _prompts(args: argparse.Namespace, tokenizer, context: int | None, notes: list[str]) -> list:
    from ..measure.prompts import KINDS, Encoder, bundled, from_file
    from ..train.data import data_file

    room = None if context is None else context - args.max_tokens - SLACK
    if room is not None and room < LEAST_ROOM:
        raise BadArgument(
            f"[max_tokens] {args.max_tokens} leaves no room for a prompt: the model's context is "
            f"{context} tokens, {SLACK} of them stay free."
        )
    templated = tokenizer.has_chat_template and not args.ignore_chat_template
    chat = partial(options.chat_tokens, tokenizer) if templated else None
    encoder = Encoder(tokenizer, chat, room)
    kinds = args.kinds if args.kinds is not None else [] if args.data else list(KINDS)
    prompts = bundled(list(dict.fromkeys(kinds)), encoder, args.prompts)
    if args.data is not None:
        own, rows = from_file(data_file(args.data, SPLIT), encoder, args.prompts)
        prompts += own
        if len(own) < rows:
            notes.append(f"{len(own)} of {rows} own prompts, spread evenly over the file")
    if not prompts:
        raise BadArgument("[kinds] must name at least one kind where there is no --data.")
    cut = sum(len(p.tokens) < p.full for p in prompts)
    if cut:
        notes.append(
            f"{cut} of {len(prompts)} prompts cut to the model's context ({context} tokens)"
        )
    return prompts


def _seams(model, notes: list[str]):
    """The seams that a model has, or gets for copied drafts; None where it cannot decode trees."""
    from ..model.seams import attach, seams_of
    from ..model.support import check_supported

    seams = seams_of(model)
    if seams is None or seams.streams is None:
        notes.append("no streams")
    if seams is None:
        try:
            check_supported(model)
        except UnsupportedModel as error:
            notes.append(f"no copied drafts: {error}")
            return None
        seams = attach(model)
    notes += options.planner_note(seams)
    return seams
