"""One self-contained HTML page from the results of benchmarks: no script, no network, light and dark."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from ..decode.costs import Costs
from ..errors import BadData
from .summary import ALL
from .svg import Bar, bars, legend, lines, stacked
from .tables import PART_NAMES, Table, about_lines, every_table, kind_name, mode_titles, ratio

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d2330; --soft: #667; --rule: #dde;
  --c0: #8a93a3; --c1: #b9c0cc; --c2: #0a6ebd; --c3: #d98a00; --c4: #0a8f6c; --c5: #b4568f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171d; --ink: #e6e9ef; --soft: #9aa3b2;
  --rule: #2c323d; --c0: #7d8799; --c1: #505a6b; --c2: #4aa8f0; --c3: #f0b040; --c4: #35c79c;
  --c5: #df88bd; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-top: 1.8rem; }
p.about, .notes { color: var(--soft); font-size: .85rem; margin: .2rem 0; }
p.main { font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg.key { width: .8rem; height: .8rem; }
svg text { fill: var(--ink); font-size: 12px; } text.e { text-anchor: end; } text.m { text-anchor: middle; }
text.h { font-weight: 600; } text.v { paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
 line.g { stroke: var(--rule); } line.w { stroke: var(--ink); }
line.r { stroke: var(--soft); stroke-dasharray: 4 3; } polyline { fill: none; stroke-width: 2; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); }
.s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; }
"""
COLOURS = {"mlx-lm": 0, "plain": 1, "streams": 2, "copies": 3, "both": 4, "mlx-lm-draft": 5}


def page(results: list[dict[str, Any]], notes: list[str] | None = None) -> str:
    """The report of one or more results, as a whole HTML page.

    Args:
        notes: lines that come before the first result.
    """
    intro = "".join(f'<p class="about">{escape(line)}</p>' for line in notes or [])
    body = "".join(_result(r) for r in results)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mlx-specstream bench</title><style>{STYLE}</style></head>"
        f"<body><h1>mlx-specstream bench</h1>{intro}{body}</body></html>\n"
    )


def _result(results: dict[str, Any]) -> str:
    figures = results["summary"].get(ALL) or next(iter(results["summary"].values()))
    tables = every_table(results)
    plots = {
        "Acceptance by depth": _acceptance_plot,
        "Time per pass, ms": _pass_plot,
        "Memory bandwidth of plain decoding": _bandwidth_plot,
    }
    parts = [f"<h2>{escape(results['model']['name'])}, {escape(results['made'])}</h2>"]
    parts.append(f'<p class="main">{escape(headline(results, figures))}</p>')
    parts += [f'<p class="about">{escape(line)}</p>' for line in about_lines(results)]
    parts.append(
        "<h3>Speed-up over mlx_lm.stream_generate, prompt included, with its range over the repeats</h3>"
    )
    parts.append(_speed_plot(results))
    parts.append("<h3>Tokens per pass</h3>")
    parts.append(_passes_plot(results))
    for table in tables:
        plot = plots.get(table.title)
        if plot is None and table.title.startswith("Costs that tune"):
            plot = _tune_plot
        parts.append(_table(table, plot(results) if plot else ""))
    return f"<section>{''.join(parts)}</section>"


def read_tune(path: Path) -> dict[str, Any]:
    """``machine``, ``model`` and ``costs`` of what ``mlx-specstream tune --json`` wrote.

    Raises:
        BadData: not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        costs = {k: v for k, v in found["costs"].items() if k in Costs.__dataclass_fields__}
        costs = Costs(**{"measured": True, **costs}).to_json()
        return {"machine": found["machine"], "model": str(found["model"]), "costs": costs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadData(f"[tune] {path} is not what mlx-specstream tune writes: {line}") from None


def headline(results: dict[str, Any], figures: dict[str, Any]) -> str:
    """The last of our own ways, which is the default where there are streams, in one line."""
    mode = next(m for m in ("both", "copies", "plain") if m in figures)
    f = figures[mode]
    return (
        f"{mode_titles(results)[mode]}: {ratio(f['speedup'])} the speed of mlx_lm.stream_generate, "
        f"{f['tokens_per_pass']:.2f} tokens per pass, same text for {f['identical']} of {f['of']} prompts."
    )


def _table(table: Table, plot: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in table.notes)
    return (
        f"<h3>{escape(table.title)}</h3>{plot}"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}'
    )


def _speed_plot(results) -> str:
    titles, groups = mode_titles(results), []
    for kind, figures in results["summary"].items():
        group = []
        for mode, f in list(figures.items())[1:]:
            s = f["speedup"]
            bar = Bar(titles[mode], s["median"], ratio(s), COLOURS[mode], s["low"], s["high"])
            group.append(bar)
        groups.append((kind_name(kind), group))
    return bars("speed-up by kind of prompt", groups, reference=1.0)


def _passes_plot(results) -> str:
    titles, groups = mode_titles(results), []
    for kind, figures in results["summary"].items():
        group = [
            Bar(titles[mode], f["tokens_per_pass"], f"{f['tokens_per_pass']:.2f}", COLOURS[mode])
            for mode, f in figures.items()
            if mode not in ("mlx-lm", "plain")
        ]
        groups.append((kind_name(kind), group))
    return bars("tokens per pass by kind of prompt", groups, reference=1.0)


def _acceptance_plot(results) -> str:
    titles = mode_titles(results)
    figures = results["summary"].get(ALL) or next(iter(results["summary"].values()))
    drawn = {mode: f["acceptance"] for mode, f in figures.items() if f.get("acceptance")}
    if not drawn:
        return ""
    depth = max(map(len, drawn.values()))
    series = [(values, COLOURS[mode]) for mode, values in drawn.items()]
    plot = lines(
        "acceptance by depth",
        list(range(1, depth + 1)),
        series,
        "drafted tokens accepted",
        "share of passes",
    )
    return legend([(titles[mode], COLOURS[mode]) for mode in drawn]) + plot


def _pass_plot(results) -> str:
    titles, rows = mode_titles(results), []
    figures = results["summary"].get(ALL) or next(iter(results["summary"].values()))
    for mode, f in figures.items():
        split = f.get("split")
        values = (
            [(1e3 * split[part], 2 + n) for n, part in enumerate(PART_NAMES)]
            if split
            else [(1e3 * f["pass_s"], 0)]
        )
        rows.append((titles[mode], values, f"{sum(v for v, _ in values):.2f} ms"))
    names = [(name, 2 + n) for n, name in enumerate(PART_NAMES.values())]
    return legend([*names, ("whole pass", 0)]) + stacked("time per pass", rows)


def _bandwidth_plot(results) -> str:
    about, group = results["bandwidth"], []
    for kind, figures in results["summary"].items():
        rate = next(iter(figures.values()))["weights_gb_s"]
        group.append(Bar(kind_name(kind), rate, f"{rate:.1f} GB/s", 2))
    group.append(Bar("limit, measured here", about["gb_s"], f"{about['gb_s']:.1f} GB/s", 0))
    peak = about["vendor_peak_gb_s"]
    if peak:
        most = float(re.findall(r"\d+", peak)[-1])
        group.append(Bar("limit, vendor's figure", most, f"{peak} GB/s", 1))
    return bars("memory bandwidth", [("", group)])


def _tune_plot(results) -> str:
    costs = results["tune"]["costs"]
    series = [
        ([ms / plain for ms in line], 2 + n)
        for n, (line, plain) in enumerate(zip(costs["pass_ms"], costs["plain_ms"], strict=True))
    ]
    names = [(f"context {c}", 2 + n) for n, c in enumerate(costs["contexts"])]
    plot = lines(
        "cost of a pass by its rows", costs["rows"], series, "rows of a pass", "plain tokens", 1.0
    )
    return legend(names) + plot
