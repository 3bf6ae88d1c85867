"""The curves of a training run as one SVG file that any browser shows."""

from __future__ import annotations

from typing import Any

from .svg import WIDTH, lines

PALETTE = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#64748b")  # as in report.py
HEIGHT, TOP = 260, 26  # of a panel, and of the line above it
# key of the history -> (title, name of the axis, name of a single curve)
PANELS = {
    "loss": ("Validation loss", "nats"),
    "top1": ("Validation top-1 accuracy", "share"),
    "exit_loss": ("Early exit: validation loss", "nats"),
    "main_loss": ("Main stream: validation loss", "nats"),
    "tokens_per_pass": ("Tokens per pass, replayed on held-out prompts", "tokens"),
}


def curves(about: dict[str, Any]) -> str:
    """``train.json`` -> SVG: loss, accuracy and tokens per pass of every validation, by step."""
    history = about["history"]
    xs = [float(h["iteration"]) for h in history]
    parts, y = [], 0
    for key, (title, unit) in PANELS.items():
        if not history or any(key not in h for h in history):
            continue
        values = [h[key] if isinstance(h[key], list) else [h[key]] for h in history]
        columns = [list(column) for column in zip(*values, strict=True)]
        series = [(column, number) for number, column in enumerate(columns)]
        plot = lines(title, xs, series, "step", unit, 1.0 if key == "tokens_per_pass" else None)
        parts.append(f'<text class="t" x="8" y="{y + 18}">{title}</text>')
        if len(columns) > 1:
            parts.append(_names(len(columns), y + 18))
        place = f'<svg x="0" y="{y + TOP}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(plot.replace("<svg ", place, 1))
        y += TOP + HEIGHT + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(y, 1)}">'
        f"<title>Training of streams</title><style>{_style()}</style>{''.join(parts)}</svg>\n"
    )


def _names(count: int, y: int) -> str:
    """Which colour is which stream."""
    width = 74
    left = WIDTH - width * count
    return "".join(
        f'<rect class="c{n % len(PALETTE)}" x="{left + n * width}" y="{y - 9}" width="10" height="10"/>'
        f'<text class="v" x="{left + n * width + 14}" y="{y}">stream {n + 1}</text>'
        for n in range(count)
    )


def _style() -> str:
    rules = [
        "svg{background:#fff;font:12px system-ui,sans-serif}",
        "text{fill:#334155} .t{font-size:14px;font-weight:600}",
        ".e{text-anchor:end} .m{text-anchor:middle}",
        ".g{stroke:#e2e8f0} .r{stroke:#94a3b8;stroke-dasharray:4 3}",
        "polyline{fill:none;stroke-width:1.5}",
    ]
    rules += [f".c{n}{{fill:{c}}} .s{n}{{stroke:{c}}}" for n, c in enumerate(PALETTE)]
    return " ".join(rules)
