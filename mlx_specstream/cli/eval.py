"""How well streams do on a data file: their accuracy, a real decode with and without them, and the
quality of the answers.

Guesses are checked against the text of the data and against the model's own answers. Rows with the same
prompt are one prompt with several references. --tree may be repeated to compare several; "planned" names
the default. The tables go to stdout, the progress to stderr. Nothing written holds text of a prompt or
an answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import BadArgument
from . import options, show

HELP = "accuracy, tokens per pass and quality of the answers on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        required=True,
        help="jsonl file (may end in .gz) or a folder with one per split: rows with prompt and completion, "
        "messages, or text (its first half is the prompt)",
    )
    data.add_argument("--split", default="valid", help="of a folder (default: %(default)s)")
    data.add_argument(
        "--limit",
        type=int,
        default=100,
        help="at most so many different prompts, drawn with --seed; -1: all (default: %(default)s)",
    )
    data.add_argument(
        "--prompt-form",
        default="{}",
        help=r"what the model expects around the prompt of a row, as 'Q: {}\nA:'; \n is a new line",
    )
    options.add_template(data)
    data.add_argument(
        "--metrics",
        nargs="*",
        help="of exact, bleu, rouge (default: bleu and rouge for prose, exact for the rest)",
    )
    options.add_streams(parser, trees="append")
    options.add_sampling(parser, max_tokens=128, seed=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="raw results: numbers and ids")


def run(args: argparse.Namespace) -> None:
    from ..decode.choose import is_greedy
    from ..files import write_text
    from ..measure.bench import about_model
    from ..measure.eval_tables import every_table
    from ..measure.evaluate import Evaluation, make_ways
    from ..measure.questions import data_file, read_questions

    _check(args)
    trees = _trees(args)
    keywords = options.generation_arguments(argparse.Namespace(**{**vars(args), "tree": None}))
    path = data_file(args.data, args.split)
    model, tokenizer = options.load_model(args)
    options.templates(args, tokenizer)
    form = args.prompt_form.replace("\\n", "\n")  # a shell hands over two characters
    questions, notes = read_questions(path, tokenizer, limit=args.limit, seed=args.seed, form=form)
    context = options.context_of(model)
    if longer := sum(context is not None and len(q.example.tokens) > context for q in questions):
        notes.append(
            f"{longer} of {len(questions)} rows are longer than the {context} tokens that the model reads"
        )
    metrics = _metrics(args.metrics, [q.references for q in questions], notes)
    seams = _streams(args, model, trees, keywords, notes)
    ways = make_ways(model, tokenizer, keywords, trees, seams is not None)
    evaluation = Evaluation(ways, questions, tokenizer, metrics)
    about = options.settings(args), about_model(options.shown_name(args.model), model, seams, None)

    def tell(keep: bool = False) -> None:
        """``keep``: what is in the file of results stays."""
        results = evaluation.results(*about, notes)
        if args.json and keep and args.json.exists():
            print(f"mlx-specstream: note: {args.json} stays as it was", file=sys.stderr)
        elif args.json:
            write_text(args.json, json.dumps(results, indent=1) + "\n")
        show.print_tables(results, every_table(results))

    try:
        _measure(evaluation, seams, trees, is_greedy(keywords["sampler"]))
    except (KeyboardInterrupt, SystemExit):
        if evaluation.answered:
            notes.append(f"interrupted after {evaluation.answered} of {len(questions)} prompts")
            tell(keep=True)
        raise
    tell()


def _check(args: argparse.Namespace) -> None:
    """What can be said before a model is loaded."""
    from ..measure.quality import check_metrics

    if args.limit != -1 and args.limit < 1:
        raise BadArgument(f"[limit] must be >= 1, or -1 for all prompts; got {args.limit}.")
    options.check_output("json", args.json)
    check_metrics(args.metrics or [])


def _measure(evaluation, seams, trees: list[str | None], greedy: bool) -> None:
    from ..measure.evaluate import REPLAYED

    if seams is not None:
        with show.Progress("guesses in the data"):
            evaluation.check_guesses(seams, "data")
    with show.Progress("prompts") as progress:
        evaluation.decode(progress.step)
    if seams is None:
        return
    with show.Progress("guesses in the answers"):
        evaluation.check_guesses(seams, "own answers")
    # What streams guess that the main stream sees depends on the tree.
    if greedy and not seams.streams.config.main_sees_streams:
        shown = dict.fromkeys([*REPLAYED, *(t for t in trees if t is not None)])
        with show.Progress("trees") as progress:
            evaluation.replay(seams, list(shown), progress.step)


def _streams(args, model, trees: list[str | None], keywords: dict, notes: list[str]):
    """The seams of a model with streams; None without, when only plain decoding and copies are left."""
    from ..decode.plan import make_plan
    from ..model.seams import seams_of

    seams = seams_of(model)
    if seams is None or seams.streams is None or args.no_streams:
        for name in ("tree", "placement"):
            if getattr(args, name):
                raise BadArgument(f"[{name}] needs streams; load some, or do not set it.")
        notes.append("no streams")
        return None
    for tree in trees:  # a plan that cannot be made is said now, not after the first answers
        make_plan(seams.streams.config, tree or "chain", args.placement, keywords["prune"])
    if None in trees:
        notes += options.planner_note(seams)
    return seams


def _trees(args: argparse.Namespace) -> list[str | None]:
    """Each --tree once; None for the planner, which is also what it is without any."""
    from ..decode.tree import TreeShape
    from ..measure.evaluate import PLANNED

    given = args.tree or [PLANNED]
    return list(dict.fromkeys(None if t == PLANNED else str(TreeShape.parse(t)) for t in given))


def _metrics(given: list[str] | None, references: list[list[str]], notes: list[str]) -> list[str]:
    from ..measure.quality import choose_metrics, how_to_install, is_missing

    if given is not None:
        if given and not all(references):
            raise BadArgument("[metrics] need answers in the data; rows with text alone have none.")
        return list(dict.fromkeys(given))
    if without := sum(not several for several in references):
        notes.append(
            f"no quality: {without} of {len(references)} rows have no answer to compare with"
        )
        return []
    chosen = choose_metrics(references)
    notes += [f"left out: {how_to_install(m)}" for m in chosen if is_missing(m)]
    return [m for m in chosen if not is_missing(m)]
