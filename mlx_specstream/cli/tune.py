"""Measure what the rows of a pass cost on this machine, for this model, and store it.

The planner reads the profile from then on; it holds for this machine, model, quantisation, streams
and these library versions. Takes a minute or two; nothing else should run meanwhile. On a Linux CPU with a C++
compiler it also has MLX compile the kernels of decoding, without which passes run uncompiled there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options

HELP = "measure what rows cost on this machine"
WIDTH = 40  # characters of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    group = parser.add_argument_group("streams")
    group.add_argument(
        "--streams", help="streams folder (default: the one inside the model folder)"
    )
    group.add_argument("--force", action="store_true", help="use streams of another base")
    group.add_argument("--no-streams", action="store_true", help="measure the model alone")
    group = parser.add_argument_group("measuring")
    group.add_argument("--rows", type=int, nargs="+", help="sizes of a pass (default: 1 to 64)")
    group.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        help="tokens before the pass (default: 64 512 2048, as far as the model reads)",
    )
    group.add_argument(
        "--repeats", type=int, default=5, help="rounds over all sizes (default: %(default)s)"
    )
    group.add_argument("--json", metavar="FILE", help="write the numbers to a file, too")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..decode.costs_here import costs_key
    from ..errors import BadArgument
    from ..files import write_text
    from ..measure.machine import about_machine
    from ..measure.rows import CONTEXTS, ROWS, check_sizes, measure_costs
    from ..measure.warm import warm_up
    from ..model.seams import attach, seams_of
    from ..model.support import check_supported
    from ..profile import save_profile
    from .show import Progress

    if args.repeats < 1:
        raise BadArgument(f"[repeats] must be >= 1, got {args.repeats}.")
    rows = check_sizes("rows", args.rows or ROWS, least=1)
    if args.contexts:
        check_sizes("contexts", args.contexts, least=1)
    model, tokenizer = options.load_model(args)
    longest = options.context_of(model)
    readable = [size for size in CONTEXTS if longest is None or size < longest] or CONTEXTS[:1]
    contexts = check_sizes("contexts", args.contexts or readable, least=1)
    seams = seams_of(model)
    if seams is None:
        check_supported(model)
        seams = attach(model)
    console = Console()
    with Progress("rounds over all sizes") as progress:
        costs = measure_costs(
            seams, rows=rows, contexts=contexts, repeats=args.repeats, progress=progress.step
        )
    warm_up(model, tokenizer)
    show(console, costs)
    path = save_profile(costs_key(seams), {"costs": costs.to_json()})
    console.print(f"stored in {path}", soft_wrap=True)
    if args.json:
        about = {
            "machine": about_machine(),
            "model": Path(args.model.rstrip("/")).name,
            "costs": costs.to_json(),
        }
        write_text(Path(args.json), json.dumps(about, indent=1) + "\n")


def show(console, costs) -> None:
    """A table of milliseconds, and a picture of the curve."""
    from rich.table import Table

    table = Table(title="milliseconds per pass, and what streams add to it")
    table.add_column("rows", justify="right")
    kinds = [("pass", costs.pass_ms), ("deferred", costs.deferred_ms)]
    if costs.inline_ms is not None:
        kinds.append(("inline", costs.inline_ms))
    for name, _ in kinds:
        for context in costs.contexts:
            table.add_column(f"{name}\n@{context}", justify="right")
    for row, n in enumerate(costs.rows):
        cells = [f"{line[row]:.1f}" for _, ms in kinds for line in ms]
        table.add_row(str(n), *cells)
    console.print(table)
    for gamma, ms in zip(costs.gammas, zip(*costs.saved_ms, strict=True), strict=True):
        saved = ", ".join(f"{x:.1f} @{c}" for x, c in zip(ms, costs.contexts, strict=True))
        console.print(f"{gamma} deferred streams alone save {saved}")
    line, plain = costs.pass_ms[0], costs.plain_ms[0]
    console.print(f"a pass behind {costs.contexts[0]} tokens costs, in plain tokens:")
    for n, ms in zip(costs.rows, line, strict=True):
        bar = "█" * max(1, round(WIDTH * ms / max(line)))
        console.print(f"{n:4d} rows {bar} {ms / plain:.2f}")
