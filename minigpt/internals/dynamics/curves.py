"""Series as an HTML page of small SVG charts, without scripts or libraries."""

from __future__ import annotations

import html
import math

import numpy as np

from minigpt.internals.access.result import Result
from minigpt.internals.dynamics.series import LOSSES, moving_most
from minigpt.internals.dynamics.snapshot import KINDS, Kind
from minigpt.terminal import readable

WIDE, HIGH = 520, 236
LEFT, RIGHT, ABOVE, BELOW = 46, 104, 10, 26  # margins around the lines, for numbers, names and steps
COLOURED = 8  # maximum number of lines with a colour and a name; the others are grey
GAP = 13  # minimum distance between two names
ORDERED = ("layer", "position")  # axes with ordered labels; their colours form a gradient


def page(title: str, results: dict[str, Result]) -> str:
    """Render all series as one HTML page, for light and dark mode. Kinds with fewer than two steps are left out."""
    charts = "".join(_card(kind, result) for kind, result in results.items() if len(result.axes[0].labels) > 1)
    return PAGE.format(title=html.escape(title), style=STYLE, charts=charts)


def _card(kind: str, result: Result) -> str:
    what = LOSSES if kind == "loss" else KINDS.get(kind, Kind("label", kind, "", ""))
    unit = f" <small>{html.escape(result.unit)}</small>" if result.unit else ""
    head = f"<h2>{html.escape(result.title)}{unit}</h2><p>{html.escape(what.says)}</p>"
    return f'<figure id="{html.escape(kind)}"><figcaption>{head}</figcaption>{chart(result)}</figure>\n'


def chart(result: Result) -> str:
    """Draw step x label as an SVG element with one line per label.

    The lines that change most have a colour, a name and their last value. If the gaps between steps grow, the x axis is
    log(1 + step).
    """
    labels = result.axes[1].labels
    steps = np.array([float(step) for step in result.axes[0].labels])
    values = np.where(np.isfinite(result.values), result.values, np.nan)
    if np.isnan(values).all():
        return "<p>no finite values</p>"
    wide = _widening(steps)
    x, y = _Scale(_along(steps, wide), LEFT, WIDE - RIGHT), _Scale(_padded(values), HIGH - BELOW, ABOVE)
    coloured = moving_most(result, COLOURED)
    ordered = result.axes[1].name in ORDERED
    if ordered and len(labels) > COLOURED:
        coloured = sorted({round(i) for i in np.linspace(0, len(labels) - 1, COLOURED)})
    parts = [_grid(x, y, steps, wide)]
    ends = []
    for i in sorted(range(len(labels)), key=lambda i: i in coloured):
        known = ~np.isnan(values[:, i])
        if not known.any():
            continue
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(x(_along(steps[known], wide)), y(values[known, i]), strict=True)]
        name = html.escape(labels[i])
        style = "rest"
        if i in coloured:
            style = f"c{_colour(coloured.index(i), len(coloured), ordered)}"
            ends.append((float(y(values[known, i][-1])), name, values[known, i][-1], style))
        # A single point is drawn twice: the round line caps make it a dot.
        parts.append(f'<path class="line {style}" d="M{" L".join(points if len(points) > 1 else points * 2)}">')
        parts.append(f"<title>{name}</title></path>")
    parts += _names(ends, max(0, 2 - math.floor(math.log10(y.high - y.low))))
    if rest := len(labels) - len(coloured):
        parts.append(f'<text class="few" x="{WIDE - 4}" y="{HIGH - 8}">grey: {rest} more</text>')
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{html.escape(result.title)}">{"".join(parts)}</svg>'
    )


class _Scale:
    """Linear scale: maps the smallest number to `begin` and the largest to `end`."""

    def __init__(self, numbers: np.ndarray, begin: float, end: float) -> None:
        self.low, self.high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
        self.begin, self.end = begin, end

    def __call__(self, numbers: np.ndarray | float) -> np.ndarray:
        return self.begin + (np.asarray(numbers) - self.low) / ((self.high - self.low) or 1) * (self.end - self.begin)


def _along(steps: np.ndarray | float, wide: bool) -> np.ndarray:
    return np.log1p(steps) if wide else np.asarray(steps)


def _widening(steps: np.ndarray) -> bool:
    """Whether the gaps between steps grow from the first third to the last, as with doubling."""
    gaps = np.diff(steps)
    third = max(1, len(gaps) // 3)
    return bool(np.median(gaps[-third:]) > 4 * np.median(gaps[:third]))


def _padded(values: np.ndarray) -> np.ndarray:
    """Value range of a chart: includes zero if it is near, and is never empty."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if 0 < low < 0.5 * high:
        low = 0.0
    if 0.5 * low < high < 0:
        high = 0.0
    room = 0.04 * ((high - low) or abs(high) or 1)
    return np.array([low - (room if low else 0), high + (room if high else 0)])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round tick values from low to high, spaced by 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(power * times for times in (1, 2, 5, 10) if power * times >= raw * 0.999)
    return [round(i * apart, 12) for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def _grid(x: _Scale, y: _Scale, steps: np.ndarray, wide: bool) -> str:
    parts = []
    for value in ticks(y.low, y.high):
        place = float(y(value))
        parts.append(f'<path class="grid{" zero" if value == 0 else ""}" d="M{LEFT},{place:.1f} H{WIDE - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{place + 3.5:.1f}">{value:g}</text>')
    last = float(steps[-1])
    if wide:
        marks = [0.0, *(10.0**i for i in range(12) if 10.0**i <= last)]
    else:
        marks = ticks(float(steps[0]), last, 5)
    for mark in marks:
        if mark >= steps[0]:
            place = float(x(_along(mark, wide)))
            parts.append(f'<text class="x" x="{place:.1f}" y="{HIGH - 8}">{readable(mark)}</text>')
    return "".join(parts)


def _names(ends: list[tuple[float, str, float, str]], decimals: int) -> list[str]:
    """Names and last values at the right ends of the lines, moved apart if they would overlap."""
    ends = sorted(ends)
    places = [end[0] for end in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + GAP)
    lowest = HIGH - BELOW + 3.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - GAP
    return [
        f'<text class="name {style}" x="{WIDE - RIGHT + 8}" y="{place + 3.5:.1f}">{name} '
        f'<tspan class="last">{value:.{decimals}f}</tspan></text>'
        for place, (_, name, value, style) in zip(places, ends, strict=True)
    ]


def _colour(place: int, of: int, ordered: bool) -> int:
    """Index of a colour class: from the gradient for ordered labels, else from the distinct hues."""
    if ordered:
        return 10 + round(place / max(of - 1, 1) * (COLOURED - 1))
    return place


HUES = (262, 25, 150, 320, 75, 200, 110, 350)  # neighbours are easy to tell apart
STYLE = (
    """:root{color-scheme:light dark;--l:.56;--c:.15;--ink:#1d2129;--soft:#6b7280;--grid:#e7e9ee;--rest:#c9cdd6;
--paper:#fff;--card:#fff;--edge:#e7e9ee}
@media(prefers-color-scheme:dark){:root{--l:.74;--c:.13;--ink:#e6e8ec;--soft:#9aa1ad;--grid:#2a2f38;--rest:#4a515d;
--paper:#14171c;--card:#1a1e24;--edge:#2a2f38}}
*{box-sizing:border-box}
body{margin:0;padding:2.2rem clamp(1rem,4vw,3rem);background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.35rem;font-weight:650;margin:0 0 1.4rem;letter-spacing:-.01em}
main{display:grid;gap:1.1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));max-width:80rem}
figure{margin:0;padding:1rem 1.1rem .7rem;background:var(--card);border:1px solid var(--edge);border-radius:10px;
break-inside:avoid}
h2{font-size:1rem;font-weight:620;margin:0}h2 small{font-weight:400;color:var(--soft)}
figcaption p{margin:.1rem 0 .5rem;color:var(--soft);font-size:.86rem}
svg{display:block;width:100%;height:auto;font:11.5px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid)}.zero{stroke:var(--rest)}
.x,.y,.few{fill:var(--soft);text-anchor:middle}.y{text-anchor:end}.few{text-anchor:end}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}.line:hover{stroke-width:3.4}
.rest{stroke:var(--rest);stroke-width:1.1}.name{font-weight:600}.last{fill:var(--soft);font-weight:400}
"""
    + "".join(f".c{i}{{--hue:{hue}}}" for i, hue in enumerate(HUES))
    + "".join(f".c{10 + i}{{--hue:{round(265 - 235 * i / (COLOURED - 1))}}}" for i in range(COLOURED))
    + """
.line:not(.rest){stroke:oklch(var(--l) var(--c) var(--hue))}.name{fill:oklch(var(--l) var(--c) var(--hue))}
@media print{body{padding:0}main{grid-template-columns:1fr 1fr}}"""
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><main>
{charts}</main></body></html>
"""
