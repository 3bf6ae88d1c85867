"""The tables of a benchmark, as plain text cells: the terminal and the HTML report show the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .summary import ALL

DEPTHS = 8  # of acceptance that a table shows; the JSON has all
DIFFERENCES = 20  # that a table shows
PART_NAMES = {"base_s": "base", "streams_s": "streams", "draft_s": "draft", "host_s": "host"}


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column is words, the others are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def kind_name(kind: str) -> str:
    names = {
        ALL: "all prompts",
        "json-sql": "JSON and SQL",
        "long": "long context",
        "own": "your own",
    }
    return names.get(kind, kind)


def mode_titles(results: dict[str, Any]) -> dict[str, str]:
    return {m["key"]: m["title"] for m in results["modes"]}


def ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}x ({spread['low']:.2f}-{spread['high']:.2f})"


def every_table(results: dict[str, Any]) -> list[Table]:
    """All that there is something to say for, in reading order."""
    found = [
        *(speed(results, kind) for kind in results["summary"]),
        acceptance(results),
        time_per_pass(results),
        bandwidth(results),
        differences(results),
        *([tuned(results["tune"])] if results.get("tune") else []),
    ]
    return [table for table in found if table is not None and table.rows]


def speed(results: dict[str, Any], kind: str) -> Table:
    titles, figures = mode_titles(results), results["summary"][kind]
    sizes = [p["tokens"] for p in results["prompts"] if kind in (ALL, p["kind"])]
    baseline = next(iter(figures))
    rows = [
        [
            titles[mode],
            f"{f['tokens_per_pass']:.2f}",
            f"{f['tokens_per_second']['median']:.1f}",
            "1.00x" if mode == baseline else ratio(f["speedup"]),
            f"{f['generation_tokens_per_second']['median']:.1f}",
            "1.00x" if mode == baseline else ratio(f["generation_speedup"]),
            f"{1e3 * f['first_token_s']['median']:.0f}",
            f"{f['identical']}/{f['of']}",
        ]
        for mode, f in figures.items()
    ]
    columns = ["", "tokens\nper pass", "tokens/s", "speed-up", "generation:\ntokens/s", "speed-up"]
    size = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(min(sizes))
    title = f"{kind_name(kind)}: {len(sizes)} prompt{'s' * (len(sizes) > 1)} of {size} tokens"
    return Table(title, [*columns, "first\ntoken, ms", "same"], rows)


def acceptance(results: dict[str, Any]) -> Table:
    titles = mode_titles(results)
    picked = [
        (kind, mode, f)
        for kind, figures in results["summary"].items()
        for mode, f in figures.items()
        if "acceptance" in f
    ]
    depth = min(DEPTHS, max((len(f["acceptance"]) for *_, f in picked), default=0))
    rows = []
    for kind, mode, f in picked:
        shares = [*f["acceptance"], *[0.0] * depth][:depth]
        rows.append(
            [
                f"{kind_name(kind)}: {titles[mode]}",
                *(f"{share:.2f}" for share in shares),
                f"{f['nodes_per_pass']:.1f}",
                f"{100 * f['copied_share']:.0f}%",
            ]
        )
    columns = ["", *(str(d) for d in range(1, depth + 1)), "nodes", "copied"]
    note = (
        "Share of passes that accepted at least so many drafted tokens; nodes fed per pass, the root "
        "included; share of the accepted tokens that were copied from earlier text."
    )
    return Table("Acceptance by depth", columns, rows, [note])


def time_per_pass(results: dict[str, Any]) -> Table:
    titles = mode_titles(results)
    rows = []
    for kind, figures in results["summary"].items():
        for mode, f in figures.items():
            split = f.get("split")
            parts = [f"{1e3 * split[p]:.2f}" if split else "" for p in PART_NAMES]
            whole = f"{1e3 * sum(split[p] for p in PART_NAMES):.2f}" if split else ""
            rows.append(
                [f"{kind_name(kind)}: {titles[mode]}", f"{1e3 * f['pass_s']:.2f}", *parts, whole]
            )
    columns = ["", "as timed", *PART_NAMES.values(), "sum"]
    note = (
        "As timed: generation through passes. The parts were measured in a run of their own that waits "
        "after each part, so their sum is larger where work otherwise overlaps."
    )
    return Table("Time per pass, ms", columns, rows, [note])


def bandwidth(results: dict[str, Any]) -> Table:
    about, weights = results["bandwidth"], results["model"]["weight_bytes"]
    peak = about["vendor_peak_gb_s"]
    rows = []
    for kind, figures in results["summary"].items():
        f = next(iter(figures.values()))  # the baseline: one token, one pass
        rows.append(
            [
                kind_name(kind),
                f"{1e3 * f['pass_s']:.2f}",
                f"{f['weights_gb_s']:.1f}",
                f"{100 * f['weights_gb_s'] / about['gb_s']:.0f}%",
            ]
        )
    note = (
        f"A plain token reads {weights['per_token'] / 1e9:.3f} GB of weights (K/V not counted). Measured "
        f"limit here: {about['gb_s']:.1f} GB/s, the best of reading {about['bytes'] / 1e9:.1f} GB by sum and "
        "by matrix times vector; above 100% the weights came from a cache."
    )
    vendor = f"Vendor's figure for this chip, not measured: {peak} GB/s." if peak else ""
    columns = ["", "plain token, ms", "weights, GB/s", "of the measured limit"]
    return Table(
        "Memory bandwidth of plain decoding", columns, rows, [note, vendor] if peak else [note]
    )


def differences(results: dict[str, Any]) -> Table:
    titles, found = mode_titles(results), results["differences"]
    repeats = max((r["repeat"] for r in results["runs"]), default=0)
    rows = []
    for d in found[:DIFFERENCES]:
        prompt = results["prompts"][d["prompt"]]
        gap = "" if d["logit_gap"] is None else f"{d['logit_gap']:.4f}"
        name = f"{kind_name(prompt['kind'])} {prompt['number'] + 1}: {titles[d['mode']]}"
        rows.append([name, str(d["position"] + 1), gap, f"{d['repeats']}/{repeats}"])
    more = len(found) - len(rows)
    notes = [
        "The gap is how far the baseline's logits put its own token above the other one. Arithmetic that "
        "depends on the number of rows (16 bits, quantised weights) can turn a near tie.",
        *([f"{more} more in the JSON."] if more else []),
    ]
    columns = ["", "first different token", "logit gap", "repeats"]
    return Table("Where the text differs from mlx-lm's", columns, rows, notes)


def tuned(tune: dict[str, Any]) -> Table:
    """A row per size of a pass; what does not depend on the size is said below."""
    costs, columns, cells, notes = tune["costs"], ["rows of a pass"], [], []
    for name, table in (("pass", "pass_ms"), ("inline", "inline_ms")):
        for at, context in enumerate(costs["contexts"]):
            if costs[table] is not None:
                columns.append(f"{name} @{context}")
                cells.append([f"{ms:.2f}" for ms in costs[table][at]])
    rows = [[str(n), *row] for n, *row in zip(costs["rows"], *cells, strict=True)]
    for context, plain, deferred in zip(
        costs["contexts"], costs["plain_ms"], costs["deferred_ms"], strict=True
    ):
        line = f"behind {context} tokens: a plain token {plain:.2f}"
        constant = any(deferred) and len(set(deferred)) == 1
        notes.append(f"{line}, deferred streams {deferred[0]:.2f}" if constant else line)
    for context, saved in zip(costs["contexts"], costs["saved_ms"], strict=False):
        each = zip(costs["gammas"], saved, strict=True)
        said = ", ".join(f"{gamma} alone {ms:.2f} less" for gamma, ms in each)
        notes.append(f"of deferred streams behind {context} tokens: {said}")
    title = f"Costs that tune measured for {tune['model']}, ms @ tokens before the pass"
    return Table(title, columns, rows, notes)


def about_lines(results: dict[str, Any]) -> list[str]:
    """The machine, the model and the settings, in words."""
    m, model = results["machine"], results["model"]
    streams = model["streams"]
    with_streams = (
        f"{streams['num_streams']} streams in {streams['msa_layers']} of {model['layers']} layers"
        if streams
        else "no streams"
    )
    options = ", ".join(
        f"{k} {v}" for k, v in results["arguments"].items() if v not in (None, False)
    )
    return [
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; {m['system']}; "
        f"{m['device']} {m['device_name']}; BLAS: {m['blas']}",
        f"mlx-specstream {m['mlx-specstream']}, mlx {m['mlx']}, mlx-lm {m['mlx-lm']}, Python {m['python']}",
        f"model {model['name']} ({model['type']}, {model['weight_bytes']['all'] / 1e9:.2f} GB, {with_streams})",
        f"settings: {options}",
        *results["notes"],
    ]
