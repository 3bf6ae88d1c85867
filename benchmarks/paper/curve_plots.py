"""Pictures and tables of the curves, for docs/: SVG files of their own and one page of Markdown."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mlx_specstream.files import write_text
from mlx_specstream.measure.report import STYLE
from mlx_specstream.measure.svg import Bar, bars, lines

PAGE = "curves.md"
INTRO = """# Curves

Tokens per pass against each choice, made by `benchmarks/paper/curves.py` (raw figures:
`benchmarks/results/paper/curves.json`). Every point is a **short run of as many steps**: what is
compared is how good streams are after few steps, not how good they can become, and steps of more layers or
streams take longer. What a curve does not change is four streams in one layer, LoRA of rank 32, no conditioning
and no root, which is not what the presets make. Unless a curve is about trees, trees are best-first with at
most 32 nodes, replayed exactly.

*Predicted* columns are arithmetic, nothing measured there: tokens per pass of the best tree for that
machine over what the pass costs by row costs that others published (`tests/data/mac_curves.json`);
1.00 is plain decoding. "This machine" is the same with row costs measured on two x86 cores (`curves.py costs`).
"""


def plot(curves: dict, docs: Path) -> None:
    """Write docs/curves.md and docs/curves/*.svg.

    Args:
        curves: task -> curve -> x (a number or a name) -> figures.
    """
    tasks = list(curves)
    names = dict.fromkeys(name for found in curves.values() for name in found)
    parts = [INTRO]
    for name in names:
        file = f"curves/{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.svg"
        of_task = {task: curves[task][name] for task in tasks if name in curves[task]}
        write_text(docs / file, standing_alone(picture(name, of_task)))
        colours = ", ".join(
            f"{('grey', 'light grey', 'blue')[i]}: {t}" for i, t in enumerate(of_task)
        )
        parts.append(
            f"## {name}\n\n![tokens per pass]({file})\n\n{colours}\n\n{table(name, of_task)}"
        )
    write_text(docs / PAGE, "\n".join(parts))
    print(f"{docs / PAGE}: {len(names)} curves")


def picture(name: str, of_task: dict[str, dict]) -> str:
    """Lines over numbers, bars over names."""
    value = lambda figures: figures["tokens_per_pass"]  # noqa: E731
    every = list(dict.fromkeys(x for found in of_task.values() for x in found))
    if all(isinstance(x, int | float) for x in every):
        xs = sorted(x for x in every if math.isfinite(x))
        series = [
            ([value(found[x]) for x in xs if x in found], colour)
            for colour, found in enumerate(of_task.values())
        ]
        return lines(name, xs, series, name, "tokens per pass", reference=1.0)
    groups = [
        (task, [Bar(str(x), value(f), f"{value(f):.2f}", colour) for x, f in found.items()])
        for colour, (task, found) in enumerate(of_task.items())
    ]
    return bars(name, groups, reference=1.0)


def table(name: str, of_task: dict[str, dict]) -> str:
    """Markdown."""
    machines = list(
        dict.fromkeys(
            m for found in of_task.values() for f in found.values() for m in f.get("predicted", {})
        )
    )
    head = ["task", name, "tokens per pass", "parameters", *(f"predicted: {m}" for m in machines)]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, found in of_task.items():
        for x, f in found.items():
            shown = "all" if x == math.inf else str(x)
            cells = [task, shown, f"{f['tokens_per_pass']:.2f}", f"{f.get('parameters', 0):,}"]
            for machine in machines:
                there = f.get("predicted", {}).get(machine)
                cells.append(said(there) if there else "")
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def said(there: dict) -> str:
    speed = f"{there['speed']:.2f} ({there['tree']})"
    if "tokens_per_second" in there:
        speed += f", {there['tokens_per_second']:.0f} tokens/s"
    return speed


def standing_alone(svg: str) -> str:
    """A picture with the report's style inside, as a file of its own."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" style="background: var(--back)" '
    svg = svg.replace("<svg ", head, 1)
    return re.sub(r"(<title>)", f"<style>{STYLE}</style>\\1", svg, count=1)
