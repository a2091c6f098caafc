"""Two small pictures as inline SVG: bars and lines, with a text alternative and the page's own colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

#: drawing units; the picture scales with its box, and at 320 pixels wide its text is still 10 pixels high
WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
#: dashes and marks tell the lines apart without colour
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
MARKS = ("circle", "square", "triangle", "diamond", "cross", "bar")


@dataclass(frozen=True)
class Line:
    """One line: its name and (x, y, tooltip) points in order."""

    name: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Axes:
    """Ranges and names of both axes; guides are dashed level lines (y, label)."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_name: str
    y_name: str
    guides: Sequence[tuple[float, str]] = field(default_factory=tuple)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where the point (x, y) is drawn."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def bars(items: Sequence[tuple[str, float, str, int]], title: str) -> str:
    """Return horizontal bars. items: (name, value, text after the bar, colour class number)."""
    most = max((value for _, value, _, _ in items), default=0.0) or 1.0
    row, left, right = 30, 84, 104
    parts = [_open(WIDTH, row * len(items) + 4, title)]
    for i, (name, value, text, level) in enumerate(items):
        y, long = i * row + 4, (WIDTH - left - right) * value / most
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="f{level}" x="{left}" y="{y}" width="{max(long, 1):.1f}" height="{row - 8}" rx="3"/>'
        )
        parts.append(f'<text x="{left + long + 6:.1f}" y="{y + 16}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def lines(series: Sequence[Line], axes: Axes, title: str, star: tuple[float, float, str] | None = None) -> str:
    """Return a line chart with axes, guides, and one star for a chosen point."""
    parts = [_open(WIDTH, HEIGHT, title), _axes(axes)]
    for i, line in enumerate(series):
        places = [axes.at(x, y) for x, y, _ in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = f' stroke-dasharray="{DASHES[i % len(DASHES)]}"' if DASHES[i % len(DASHES)] else ""
        parts.append(f'<polyline class="s{i % 6}" points="{path}"{dash}/>')
        step = max(1, len(places) // 8)  # a mark on every point would hide the line
        for j, (x, y) in enumerate(places):
            shown = mark(i, x, y) if j % step == 0 or j == len(places) - 1 else ""
            if shown:
                parts.append(f'<g class="m{i % 6}"><title>{escape(line.points[j][2])}</title>{shown}</g>')
    if star is not None:
        x, y = axes.at(star[0], star[1])
        parts.append(f'<g class="star"><title>{escape(star[2])}</title>{_star(x, y)}</g>')
    return "".join([*parts, "</svg>"])


def swatch(i: int) -> str:
    """Return the piece of line that stands for series `i` in a legend."""
    dash = f' stroke-dasharray="{DASHES[i % len(DASHES)]}"' if DASHES[i % len(DASHES)] else ""
    line = f'<polyline class="s{i % 6}" points="0,7 34,7"{dash}/>'
    box = '<svg class="swatch" viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">'
    return f'{box}{line}<g class="m{i % 6}">{mark(i, 17, 7)}</g></svg>'


def mark(i: int, x: float, y: float) -> str:
    """Return the mark of series `i` at a place."""
    kind, r = MARKS[i % len(MARKS)], 3.6
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    if kind == "square":
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"/>'
    if kind == "cross":
        return f'<path d="M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"/>'
    if kind == "bar":
        return f'<path d="M{x:.1f} {y - r - 1:.1f}v{2 * r + 2}"/>'
    corners = (
        [(0, -r - 1), (r + 1, r), (-r - 1, r)]
        if kind == "triangle"
        else [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)]
    )
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}"/>'


def _star(x: float, y: float) -> str:
    offsets = [
        (0, -9),
        (2.6, -3),
        (9, -2.6),
        (4, 1.6),
        (5.6, 8),
        (0, 4.4),
        (-5.6, 8),
        (-4, 1.6),
        (-9, -2.6),
        (-2.6, -3),
    ]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in offsets)}"/>'


def _open(width: int, height: int, title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>'


def _axes(axes: Axes) -> str:
    (x0, x1), (y0, y1) = axes.x, axes.y
    parts = []
    for value in ticks(y0, y1):
        x, y = axes.at(x0, value)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.0%}</text>')
    for value in ticks(x0, x1):
        x, y = axes.at(value, y0)
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}V{TOP}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle">{value:g}</text>')
    for value, label in axes.guides:
        x, y = axes.at(x0, value)
        parts.append(f'<path class="guide" d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="note" x="{x + 4:.1f}" y="{y - 4:.1f}">{escape(label)}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axes.x_name)}</text>')
    parts.append(
        f'<text transform="translate(11 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_name)}</text>"
    )
    return "".join(parts)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers from low to high, at most about `most` of them."""
    span = high - low
    if not span > 0:
        return [low]
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500):
        if span / step <= most:
            break
    first = -(-low // step) * step
    count = int((high - first) / step + 1e-6) + 1
    return [round(first + i * step, 6) for i in range(count)]
