"""Small SVG plots as strings: bars with whiskers, stacked bars, lines. No script, no colours of their own.

Colours are classes (``c0``, ``c1``, ...) that the page's style sheet defines, so that the plots follow
its light and dark theme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH = 720  # of the drawing, in its own units
LEFT, RIGHT = 180, 140  # room for names and for values
ROW, BAR = 22, 14  # height of a row and of its bar
COLOURS = 6


@dataclass(frozen=True)
class Bar:
    """A bar, with whiskers from ``low`` to ``high`` where they are given."""

    name: str
    value: float
    text: str
    colour: int = 0
    low: float | None = None
    high: float | None = None


def bars(title: str, groups: list[tuple[str, list[Bar]]], reference: float | None = None) -> str:
    """Horizontal bars in named groups, from 0; a dashed line at ``reference``."""
    every = [bar for _, group in groups for bar in group]
    top = max([bar.high or bar.value for bar in every] + [reference or 0.0, 1e-9])
    scale = (WIDTH - LEFT - RIGHT) / top
    parts, y = [], 4
    for name, group in groups:
        if name:
            parts.append(_text(4, y + 14, name, "h"))
            y += ROW
        for bar in group:
            middle = y + BAR / 2
            parts.append(_text(LEFT - 8, middle + 4, bar.name, "e"))
            parts.append(_rect(LEFT, y, bar.value * scale, BAR, bar.colour))
            end = bar.value
            if bar.low is not None and bar.high is not None:
                end = bar.high
                parts.append(_whisker(LEFT + bar.low * scale, LEFT + bar.high * scale, middle))
            parts.append(_text(LEFT + end * scale + 6, middle + 4, bar.text, "v"))
            y += ROW
        y += 6
    if reference is not None:
        x = LEFT + reference * scale
        parts.insert(0, f'<line class="r" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y}"/>')
    return _svg(title, y, parts)


def stacked(title: str, rows: list[tuple[str, list[tuple[float, int]], str]]) -> str:
    """Horizontal bars of parts: (name, [(value, colour)], text at the end)."""
    top = max([sum(v for v, _ in values) for _, values, _ in rows] + [1e-9])
    scale = (WIDTH - LEFT - RIGHT) / top
    parts, y = [], 4
    for name, values, text in rows:
        parts.append(_text(LEFT - 8, y + BAR / 2 + 4, name, "e"))
        x = LEFT
        for value, colour in values:
            parts.append(_rect(x, y, value * scale, BAR, colour))
            x += value * scale
        parts.append(_text(x + 6, y + BAR / 2 + 4, text, "v"))
        y += ROW
    return _svg(title, y, parts)


def lines(
    title: str,
    xs: list[float],
    series: list[tuple[list[float], int]],
    x_name: str,
    y_name: str,
    reference: float | None = None,
    height: int = 260,
) -> str:
    """Lines over common points, each with a colour; a list shorter than ``xs`` ends early."""
    top = max([v for values, _ in series for v in values] + [reference or 0.0, 1e-9])
    step = _step(top)
    top = step * math.ceil(top / step - 1e-9)
    left, above, bottom, right = 50, 24, height - 36, WIDTH - 16
    low, high = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / (high - low) if high > low else 0.5
        return left + across * (right - left), bottom - y / top * (bottom - above)

    parts = []
    for n in range(round(top / step) + 1):
        _, y = at(low, n * step)
        parts.append(f'<line class="g" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{n * step:g}", "e"))
    taken = -math.inf
    for x in xs:
        place, _ = at(x, 0)
        if place - taken >= 22:  # names closer than this would lie over each other
            parts.append(_text(place, bottom + 16, f"{x:g}", "m"))
            taken = place
    parts.append(_text(right, height - 4, x_name, "e"))
    parts.append(_text(4, 10, y_name, "v"))
    if reference is not None:
        (x1, y), (x2, _) = at(low, reference), at(high, reference)
        parts.append(f'<line class="r" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for values, colour in series:
        points = [at(x, v) for x, v in zip(xs, values, strict=False)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="s{_colour(colour)}" points="{path}"/>')
        parts += [
            f'<circle class="c{_colour(colour)}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
            for x, y in points
        ]
    return _svg(title, height, parts)


def legend(names: list[tuple[str, int]]) -> str:
    """Names beside their colours, as HTML."""
    items = (
        f'<li><svg viewBox="0 0 12 12" class="key"><rect class="c{_colour(c)}" width="12" height="12"/>'
        f"</svg> {escape(name)}</li>"
        for name, c in names
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _colour(number: int) -> int:
    return number % COLOURS


def _step(top: float) -> float:
    """A round distance between grid lines, for about five of them."""
    size = 10.0 ** math.floor(math.log10(top / 5))
    return next(size * m for m in (1, 2, 5, 10) if top / (size * m) <= 6)


def _rect(x: float, y: float, width: float, height: float, colour: int) -> str:
    return (
        f'<rect class="c{_colour(colour)}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{max(0.0, width):.1f}" height="{height}"/>'
    )


def _whisker(x1: float, x2: float, y: float) -> str:
    ends = "".join(
        f'<line class="w" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 4:.1f}" y2="{y + 4:.1f}"/>'
        for x in (x1, x2)
    )
    return f'<line class="w" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{ends}'


def _text(x: float, y: float, text: str, kind: str) -> str:
    """``kind``: h a heading, v at its left end, e at its right end, m in its middle."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(title: str, height: float, parts: list[str]) -> str:
    name = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )
