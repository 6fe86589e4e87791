"""Plot curves as SVG for the docs."""

from __future__ import annotations

import html
import math

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 40, 48
COLOURS = ("#3b6fd4", "#d4603b", "#2f9e6e", "#8a5fc7", "#b08a1e")

Points = list[tuple[float, float]]


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers that span low .. high, for an axis."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def curves(title: str, lines: dict[str, Points], marks: dict[str, Points], x_name: str, y_name: str) -> str:
    """Return an SVG with named lines over a common x and dots in the colours of the lines; both axes are linear.

    Args:
        title: text above the plot.
        lines: name -> points (x, y); the order of the names decides the colours.
        marks: name -> points (x, y), drawn as dots labelled with y.
        x_name: label of the x axis, with the unit.
        y_name: label of the y axis.
    """
    points = [point for group in (lines, marks) for line in group.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    low, high = low - 0.05 * (high - low), high + 0.02 * (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - min(0, *xs)) / (max(xs) - min(0, *xs)) * (WIDTH - LEFT - RIGHT)
        return round(right, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    floor = HEIGHT - BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" font-weight="600" fill="#222">{html.escape(title)}</text>',
    ]
    for tick in _ticks(low, high):
        _, y = place(0, tick)
        out.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#555">{tick:g}</text>')
    for tick in _ticks(min(0, *xs), max(xs), 8):
        x, _ = place(tick, low)
        out.append(f'<text x="{x}" y="{floor + 18}" text-anchor="middle" fill="#555">{tick:g}</text>')
    out.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#555">{html.escape(x_name)}</text>'
        f'<text x="{LEFT}" y="{TOP - 4}" fill="#555">{html.escape(y_name)}</text>'
    )
    names = list(dict.fromkeys([*lines, *marks]))
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in lines.get(name, [])))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for point in marks.get(name, []):
            x, y = place(*point)
            anchor, shift = ("end", -8) if x > WIDTH - 90 else ("start", 8)
            out.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}" stroke="#fff"/>')
            out.append(
                f'<text x="{x + shift}" y="{y - 6}" text-anchor="{anchor}" fill="{colour}">{point[1]:.3f}</text>'
            )
        top = TOP + 16 + 18 * i
        out.append(f'<path d="M{WIDTH - 190} {top - 4}h18" stroke="{colour}" stroke-width="2.5"/>')
        out.append(f'<text x="{WIDTH - 166}" y="{top}" fill="#333">{html.escape(name)}</text>')
    return "\n".join([*out, "</svg>\n"])


def smooth(points: Points, over: float) -> Points:
    """Return the running mean over the last `over` units of x, to remove the noise of single batches."""
    out: Points = []
    first, total = 0, 0.0
    for i, (x, y) in enumerate(points):
        total += y
        while points[first][0] < x - over:
            total -= points[first][1]
            first += 1
        out.append((x, total / (i - first + 1)))
    return out
