"""Snapshots over training as results, and as lines in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt.checkpoint.runs import checkpoints_of, is_whole, read_metrics, step_of
from minigpt.durable import named_path
from minigpt.errors import CheckpointError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.dynamics.context import held_out
from minigpt.internals.dynamics.snapshot import KINDS, Kind, numbers, snapshot
from minigpt.sampling.run import load
from minigpt.terminal import notice

LOSSES = Kind("split", "Loss", "nats", "On the training batches and on the validation split.")
SPARKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters per line
MOST = 12  # maximum lines per kind


def series(rows: Sequence[dict[str, Any]]) -> dict[str, Result]:
    """Collect rows of metrics.jsonl into one result per kind: step x label, NaN for missing values.

    Unknown kinds are included under their own names. "loss" comes first; without any other kind the result is empty.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        for key, value in row.items():
            kind, label = _place(key)
            if kind and isinstance(value, int | float):
                found.setdefault(kind, {}).setdefault(row["step"], {})[label] = value
    order = ["loss", *KINDS]
    kinds = sorted(found, key=lambda kind: order.index(kind) if kind in order else len(order))
    return {kind: _result(kind, found[kind]) for kind in kinds} if set(found) - {"loss"} else {}


def _place(key: str) -> tuple[str, str]:
    """Split a key of metrics.jsonl into kind and label; "" for keys that are not part of a series."""
    if key in ("train/loss", "val/loss"):
        return "loss", key.removesuffix("/loss")
    front, _, rest = key.partition("/")
    kind, _, label = rest.partition("/")
    return (kind, label) if front == "internals" else ("", "")


def _result(kind: str, by_step: dict[int, dict[str, float]]) -> Result:
    what = LOSSES if kind == "loss" else KINDS.get(kind, Kind("label", kind, "", ""))
    steps = sorted(by_step)
    labels = list(dict.fromkeys(label for step in steps for label in by_step[step]))
    values = np.array([[by_step[step].get(label, np.nan) for label in labels] for step in steps], dtype=float)
    axes = (Axis("step", [str(step) for step in steps]), Axis(what.axis, labels))
    return Result(what.title, values, axes, what.unit)


def of_run(run: Path | str) -> dict[str, Result]:
    """Read the series of a run that was trained with internals.every.

    Raises:
        CheckpointError: the run does not exist.
        DataError: the run has no snapshots.
    """
    run = named_path(run, "a run")
    if not (run / "metrics.jsonl").is_file():
        raise CheckpointError(f"{run}: contains no metrics.jsonl; give the folder of a run, such as runs/NAME")
    found = series(read_metrics(run / "metrics.jsonl"))
    if not found:
        raise DataError(
            f"{run}: has no snapshots from training; train with --internals.every log, or measure the existing "
            f"checkpoints with --checkpoints"
        )
    return found


def of_checkpoints(run: Path | str, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Take a snapshot of each checkpoint of a run, oldest first; yield them as rows for `series`.

    Checkpoints of a running training that are pruned in the meantime are skipped, with a notice.

    Raises CheckpointError if the run has no complete checkpoint.
    """
    folders = [folder for folder in reversed(checkpoints_of(named_path(run, "a run"))) if is_whole(folder)]
    if not folders:
        raise CheckpointError(f"{run}: contains no complete checkpoint; give the folder of a run, such as runs/NAME")
    ids = None
    for folder in folders:
        try:
            study = Access(load(folder, device=device))
        except CheckpointError:
            if folder.is_dir():
                raise
            notice(f"{folder}: pruned before it was read; skipped")
            continue
        ids = held_out(study) if ids is None else ids
        yield {"step": step_of(folder), **numbers(snapshot(study, ids))}


def moving_most(result: Result, most: int) -> list[int]:
    """Indices of the `most` labels of step x label whose values change most over the steps, in their original order."""
    values = np.where(np.isfinite(result.values), result.values, np.nan)
    span = [np.ptp(column[~np.isnan(column)]) if (~np.isnan(column)).any() else 0.0 for column in values.T]
    return sorted(np.argsort(-np.array(span), kind="stable")[:most].tolist())


def lines(results: dict[str, Result]) -> str:
    """Format the series for a terminal: one sparkline per label, for those that change most; one scale per kind."""
    parts = []
    for result in results.values():
        steps, labels = (axis.labels for axis in result.axes)
        shown = moving_most(result, MOST)
        finite = result.values[np.isfinite(result.values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        unit = f", {result.unit}" if result.unit else ""
        head = f"{result.title}{unit}: steps {steps[0]} to {steps[-1]}, from {low:.3g} ▁ to {high:.3g} █"
        width = max(len(labels[i]) for i in shown)
        body = [f"  {labels[i]:{width}}  {_line(result.values[:, i], low, high)}" for i in shown]
        rest = len(labels) - len(shown)
        parts.append("\n".join([head, *body, *([f"  ... and {rest} more that change less"] if rest else [])]))
    return "\n\n".join(parts)


def _line(values: np.ndarray, low: float, high: float) -> str:
    known = values[np.isfinite(values)]
    if not known.size:
        return "no finite values"
    picked = known[np.linspace(0, len(known) - 1, min(len(known), WIDTH)).round().astype(int)]
    heights = ((picked - low) / ((high - low) or 1) * (len(SPARKS) - 1)).round().astype(int)
    return f"{''.join(SPARKS[height] for height in heights):{WIDTH}}  {known[0]:8.3f} -> {known[-1]:.3f}"
