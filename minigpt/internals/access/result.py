"""The return type of every analysis: numbers with labelled axes that print, display in a notebook, and save."""

from __future__ import annotations

import csv
import html
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt.durable import json_text, write_text
from minigpt.errors import ConfigError

SHADES = " ░▒▓█"
WIDEST = 24  # maximum columns of a printed grid, and rows of a printed list


class Axis(NamedTuple):
    """Name and labels of one axis of a result."""

    name: str
    labels: list[str]


@dataclass
class Result:
    """An array with labelled axes.

    `print` shows a list or a grid, a notebook shows a coloured table, `save` writes .json, .csv, .npz or .html.
    """

    title: str
    values: np.ndarray
    axes: tuple[Axis, ...]
    unit: str = ""
    """Unit of the values: nats, probability, logits..."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Numbers about the whole result: sums, remainders, scales, caps."""

    def __post_init__(self) -> None:
        if isinstance(self.values, torch.Tensor):
            self.values = self.values.detach().cpu().double().numpy()
        self.values = np.asarray(self.values)
        self.axes = tuple(Axis(name, [str(label) for label in labels]) for name, labels in self.axes)
        if self.values.shape != tuple(len(axis.labels) for axis in self.axes):
            raise ConfigError(
                f"{self.title}: values {self.values.shape}, but labels for {[len(a.labels) for a in self.axes]}"
            )

    def __getitem__(self, labels: str | tuple[str, ...]) -> float:
        """Return the value at these labels, one per axis. Raises ConfigError for an unknown label."""
        labels = (labels,) if isinstance(labels, str) else labels
        where = []
        for axis, label in zip(self.axes, labels, strict=True):
            if str(label) not in axis.labels:
                raise ConfigError(f"{axis.name} {label!r}: not one of {', '.join(axis.labels[:WIDEST])}")
            where.append(axis.labels.index(str(label)))
        return float(self.values[tuple(where)])

    def top(self, count: int = 10, *, smallest: bool = False) -> list[tuple[tuple[str, ...], float]]:
        """Return the `count` largest (or smallest) values with their labels, sorted. NaN is ignored."""
        flat = self.values.reshape(-1).astype(float)
        ranked = np.argsort(flat if smallest else -flat, kind="stable").tolist()
        order = [i for i in ranked if not np.isnan(flat[i])][:count]
        places = [np.unravel_index(i, self.values.shape) for i in order]
        return [(self._labels(place), float(self.values[place])) for place in places]

    def _labels(self, place: Sequence[Any]) -> tuple[str, ...]:
        return tuple(axis.labels[int(i)] for axis, i in zip(self.axes, place, strict=True))

    # Display.

    def __str__(self) -> str:
        head = f"{self.title}{f' ({self.unit})' if self.unit else ''}"
        body = {1: self._list, 2: self._grid}.get(self.values.ndim, self._tops)()
        tail = "  ".join(f"{name} {_short(value)}" for name, value in self.notes.items())
        return "\n".join(part for part in (head, body, tail) if part)

    __repr__ = __str__

    def _list(self) -> str:
        labels = [_visible(label) for label in self.axes[0].labels]
        width = max((len(label) for label in labels), default=0)
        greatest = _greatest(self.values)
        shown = range(len(labels)) if len(labels) <= WIDEST else sorted(np.argsort(-np.abs(self.values))[:WIDEST])
        bars = ["█" * round(20 * min(1, abs(value) / greatest)) for value in np.nan_to_num(self.values)]
        lines = [
            f"  {labels[i]:{width}}  {self.values[i]:+10.4f}  {bars[i]}" for i in shown if not np.isnan(self.values[i])
        ]
        left = len(labels) - len(lines)
        return "\n".join([*lines, *([f"  ... and {left} smaller"] if left > 0 else [])])

    def _grid(self) -> str:
        rows, columns = self.axes
        if len(columns.labels) > WIDEST:
            return self._tops()
        heads = [_visible(label) for label in columns.labels]
        values = self.values.astype(float)
        greatest = _greatest(values)
        cells = [
            ["-" if np.isnan(value) else f"{value:.3f}{_shade(value / greatest)}" for value in row] for row in values
        ]
        width = max(8, *(len(text) + 1 for row in [heads, *cells] for text in row))
        first = max(len(_visible(label)) for label in rows.labels)
        lines = [" " * (first + 2) + "".join(f"{label:>{width}}" for label in heads)]
        for label, row in zip(rows.labels, cells, strict=True):
            lines.append(f"  {_visible(label):{first}}" + "".join(f"{cell:>{width}}" for cell in row))
        return "\n".join(lines)

    def _tops(self) -> str:
        sizes = " x ".join(f"{len(axis.labels)} {axis.name}" for axis in self.axes)
        lines = [
            f"  {', '.join(_visible(label) for label in labels):30} {value:+.4f}" for labels, value in self.top(10)
        ]
        return "\n".join([f"  {sizes}; largest values:", *lines])

    def _repr_html_(self) -> str:
        grid = self.values.astype(float)
        grid = grid.reshape(len(self.axes[0].labels), -1) if grid.ndim > 1 else grid[:, None]
        columns = list(product(*(axis.labels for axis in self.axes[1:]))) or [("",)]
        greatest = _greatest(grid)
        cells = "".join(
            f"<tr><th>{html.escape(_visible(label))}</th>"
            + "".join(f'<td style="background:{_colour(value / greatest)}">{value:.4g}</td>' for value in line)
            + "</tr>"
            for label, line in zip(self.axes[0].labels, grid, strict=True)
        )
        heads = "".join(f"<th>{html.escape(' '.join(map(_visible, names)))}</th>" for names in columns)
        notes = html.escape("  ".join(f"{name} {_short(value)}" for name, value in self.notes.items()))
        head = html.escape(f"{self.title} {f'({self.unit})' if self.unit else ''}")
        table = f"<table><tr><th></th>{heads}</tr>{cells}</table>"
        return f"<figure><figcaption>{head}</figcaption>{table}<p>{notes}</p></figure>"

    # Export.

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; NaN and infinities become null."""
        return {
            "title": self.title,
            "unit": self.unit,
            "axes": [{"name": axis.name, "labels": axis.labels} for axis in self.axes],
            "values": _plain(self.values.tolist()),
            "notes": _plain(self.notes),
        }

    def save(self, path: str | Path) -> Path:
        """Write to a file whose ending says how: .json, .csv (one value per line), .npz or .html."""
        path = Path(path)
        match path.suffix:
            case ".json":
                write_text(path, json_text(self.to_dict(), allow_nan=False))
            case ".csv":
                out = io.StringIO()
                writer = csv.writer(out, lineterminator="\n")
                writer.writerow([*(axis.name for axis in self.axes), self.unit or "value"])
                for place, value in np.ndenumerate(self.values):
                    writer.writerow([*self._labels(place), value])
                write_text(path, out.getvalue())
            case ".npz":
                labels: dict[str, Any] = {
                    f"axis{i}_{axis.name}": np.array(axis.labels) for i, axis in enumerate(self.axes)
                }
                np.savez(path, values=self.values, **labels)
            case ".html":
                write_text(path, PAGE.format(title=html.escape(self.title), body=self._repr_html_()))
            case _:
                raise ConfigError(f"{path}: unknown extension; expected .json, .csv, .npz or .html")
        return path


class Tabled(ABC):
    """A result with several tables. Notebooks show its main table, and `save` writes it."""

    @abstractmethod
    def table(self) -> Result:
        """Return the main table."""

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Convert the main table to JSON types."""
        return self.table().to_dict()

    def save(self, path: str | Path) -> Path:
        """Write the main table to a file; see `Result.save`."""
        return self.table().save(path)


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>:root{{color-scheme:light dark}}body{{font:14px system-ui;margin:2rem}}table{{border-collapse:collapse}}
td,th{{padding:.2rem .5rem;text-align:right;font-variant-numeric:tabular-nums}}</style></head><body>{body}</body></html>
"""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.integer) else value


def _visible(label: str) -> str:
    return (
        label.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍") if label.strip(" ") else label.replace(" ", "␣")
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _greatest(values: np.ndarray) -> float:
    """Largest finite magnitude, the scale of bars and colours; 1 if all values are zero or not finite."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0


def _shade(share: float) -> str:
    """Shading character for a magnitude, for terminals; a space for NaN."""
    return " " if np.isnan(share) else SHADES[round(4 * min(1.0, abs(share)))]


def _colour(share: float) -> str:
    """CSS colour: blue for positive, red for negative, transparent for zero; readable in light and dark mode."""
    share = 0.0 if np.isnan(share) else share
    return f"rgb({'70 130 230' if share >= 0 else '230 90 70'} / {min(1, abs(share)) * 0.8:.2f})"
