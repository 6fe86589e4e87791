"""A run's metrics.jsonl as a table: `run.metrics["val/loss"]`, `run.metrics.plot("train/loss", "val/loss")`."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.durable import write_text
from minigpt.errors import ConfigError, imported

COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df")
WIDTH, HEIGHT, MARGIN = 640, 320, 48


class MetricsTable(Mapping[str, np.ndarray]):
    """Columns by name, each float64 with one entry per row of metrics.jsonl; NaN where a row has no such number."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        numbers = (int, float)
        self.names = list(dict.fromkeys(name for row in rows for name, v in row.items() if isinstance(v, numbers)))

    def __getitem__(self, name: str) -> np.ndarray:
        """One column. Raises ConfigError for an unknown name."""
        if name not in self.names:
            raise ConfigError(f"metrics: {name!r} is not one of {', '.join(self.names) or 'none'}")
        values = [row.get(name) for row in self.rows]
        return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the rows that have this number."""
        values = self[name]
        there = ~np.isnan(values)
        return self["step"][there], values[there]

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row per row of metrics.jsonl. Raises MissingExtra without pandas."""
        return imported("pandas", "", "metrics.to_pandas").DataFrame(self.rows)

    def plot(self, *names: str) -> Chart:
        """A chart of these columns by step, which a notebook displays; by default the losses."""
        names = names or tuple(name for name in self.names if name.endswith("/loss"))
        return Chart({name: self.series(name) for name in names})

    def __repr__(self) -> str:
        return f"MetricsTable({len(self.rows)} rows: {', '.join(self.names)})"


class Chart:
    """Lines over steps as SVG: shown by a notebook, or saved with `save`."""

    def __init__(self, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.lines = lines

    def save(self, path: str | Path) -> Path:
        """Write the chart to an .svg file."""
        path = Path(path)
        if path.suffix != ".svg":
            raise ConfigError(f"{path}: unknown extension; expected .svg")
        write_text(path, self._repr_svg_())
        return path

    def _repr_svg_(self) -> str:
        drawn = [values for values in self.lines.values() if len(values[0])]
        low_x, high_x = _range([steps for steps, _ in drawn])
        low_y, high_y = _range([values for _, values in drawn])
        bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN // 2

        def place(x: float, y: float) -> str:
            across = MARGIN + (x - low_x) / (high_x - low_x) * (right - MARGIN)
            return f"{across:.1f},{bottom - (y - low_y) / (high_y - low_y) * (bottom - MARGIN // 2):.1f}"

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="12" '
            f'font-family="sans-serif"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<polyline fill="none" stroke="#888" points="{MARGIN},{MARGIN // 2} {MARGIN},{bottom} {right},{bottom}"/>',
        ]
        for y in (low_y, (low_y + high_y) / 2, high_y):
            parts.append(f'<text text-anchor="end" x="{MARGIN - 6}" y="{place(low_x, y).split(",")[1]}">{y:.4g}</text>')
        for x in (low_x, high_x):
            across = place(x, low_y).split(",")[0]
            parts.append(f'<text text-anchor="middle" x="{across}" y="{bottom + 16}">{x:g}</text>')
        parts.append(f'<text text-anchor="middle" x="{(MARGIN + right) // 2}" y="{bottom + 32}">step</text>')
        for number, (name, (steps, values)) in enumerate(self.lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            points = " ".join(place(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y))
            parts.append(f'<polyline fill="none" stroke-width="1.5" stroke="{colour}" points="{points}"/>')
            label = f'<text x="{right - 110}" y="{MARGIN // 2 + 16 * (number + 1)}" fill="{colour}">{html.escape(name)}'
            parts.append(f"{label}</text>")
        return "\n".join([*parts, "</svg>"])


def _range(arrays: list[np.ndarray]) -> tuple[float, float]:
    joined = np.concatenate(arrays) if arrays else np.zeros(1)
    joined = joined[np.isfinite(joined)]
    low, high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
