"""The tables of ``eval``; those that it shares with ``bench`` are in ``tables.py``."""

from __future__ import annotations

import statistics
from typing import Any

from .prompts import OWN
from .quality import TITLES, about
from .tables import Table, acceptance, differences, mode_titles


def every_table(results: dict[str, Any]) -> list[Table]:
    """All that there is something to say for, in reading order."""
    found = [
        accuracy(results),
        decoding(results),
        acceptance(results),
        replayed(results),
        differences(results),
    ]
    return [table for table in found if table.rows]


def accuracy(results: dict[str, Any]) -> Table:
    names = {
        "top1": "first guess",
        "topk": f"among the first {results['top_k']}",
        "loss": "loss, nats",
    }
    rows = [
        [f"{text}: {title}", *(f"{value:.3f}" for value in found[key])]
        for text, found in results["accuracy"].items()
        for key, title in names.items()
    ]
    depth = max((len(row) - 1 for row in rows), default=0)
    counts = [f"{text} {f['positions']}" for text, f in results["accuracy"].items()]
    note = f"Share of positions at which a stream guesses the text's token; positions: {', '.join(counts)}."
    columns = ["", *(f"stream {j}" for j in range(1, depth + 1))]
    return Table("Accuracy of the streams, teacher-forced", columns, rows, [note])


def decoding(results: dict[str, Any]) -> Table:
    """Passes, time, sameness and quality of each way, plain decoding first."""
    titles, figures = mode_titles(results), results["summary"][OWN]
    scores = list(next(iter(results["quality"].values())))
    rows, plain = [], _seconds(results, next(iter(figures)))
    for way, f in figures.items():
        seconds = _seconds(results, way)
        ratios = [before / now for before, now in zip(plain, seconds, strict=True)]
        rows.append(
            [
                titles[way],
                f"{f['tokens_per_pass']:.2f}",
                f"{statistics.median(seconds):.3f}",
                f"{statistics.median(ratios):.2f}x",
                f"{f['identical']}/{f['of']}",
                *(f"{results['quality'][way][name]:.1f}" for name in scores),
            ]
        )
    columns = ["", "tokens\nper pass", "s per\nanswer", "speed-up", "same\ntext"]
    count = len(results["prompts"])
    notes = [
        "Tokens per pass: sum over sum, the prompts' own passes not counted. Seconds with the prompt's; "
        "they and the speed-up over plain are medians over prompts. Same text: token for token plain's.",
        *about(results["metrics"]),
    ]
    title = f"{count} prompt{'s' * (count > 1)}, decoded"
    return Table(title, [*columns, *(TITLES[name] for name in scores)], rows, notes)


def _seconds(results: dict[str, Any], way: str) -> list[float]:
    """Of every prompt, in their order."""
    return [r["seconds"] for r in results["runs"] if r["mode"] == way]


def replayed(results: dict[str, Any]) -> Table:
    rows = [
        [
            tree,
            f"{f['tokens_per_pass']:.2f}",
            *(f"{share:.2f}" for share in f["acceptance"]),
            f"{f['nodes_per_pass']:.1f}",
        ]
        for tree, f in results["replayed"].items()
    ]
    depth = max((len(row) - 3 for row in rows), default=0)
    columns = ["", "tokens\nper pass", *(str(d) for d in range(1, depth + 1)), "nodes"]
    note = (
        "Trees of streams alone, counted exactly without decoding: tokens per pass, share of passes that "
        "accept at least so many drafted tokens, nodes per pass."
    )
    return Table("Trees, replayed on the plain answers", columns, rows, [note])
