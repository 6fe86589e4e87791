"""The checkpoints of a run: which are valid, which is the newest, which is the best.

runs/NAME/
metrics.jsonl                       what was measured while it trained, one object per row
best.json                           step and validation loss of the best checkpoint, sealed by its own sha256
checkpoints/step-00000500/          a checkpoint: its manifest.json is written last, and covers every byte
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minigpt.checkpoint.manifest import read_json, signature_of, verify_once
from minigpt.durable import (
    is_intact,
    named_path,
    sealed,
    to_json,
    write_text,
)
from minigpt.errors import CheckpointError

BEST = "best.json"
STEP_FOLDER = re.compile(r"step-(\d{8,18})")

TRIES = 10  # checkpoints of a run that are replaced before they are read, until that is an error

Say = Callable[[str], None]
Made = TypeVar("Made")


def silent(line: str) -> None:
    """For who does not want to hear what was skipped."""


class Replaced(CheckpointError):
    """A checkpoint was there, and was gone or another one before all of it was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder}: was removed or changed while it was read; try again, name a checkpoint that stays, or the run"
        )


# All of a run.


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first, finished or not.

    Raises CheckpointError where checkpoints/ is a link that leads out of the run.
    """
    folder = run / "checkpoints"
    refuse_link(folder, run)
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step-"))


def refuse_link(path: Path, run: Path) -> None:
    """Raise CheckpointError where a path of a run is a link that leads out of it."""
    target = path.resolve()
    if path.is_symlink() and not target.is_relative_to(run.resolve()):
        raise CheckpointError(
            f"{path}: is a link that leads out of the run, to {target}; put the folder itself there, or name the target"
        )


def is_whole(folder: Path, say: Say = silent) -> bool:
    """Whether a checkpoint of a run verifies and is no link to elsewhere; `say` hears why not, unless it has gone."""
    try:
        refuse_link(folder, folder.parent.parent)
        verify_once(folder)
    except (CheckpointError, OSError) as error:
        if os.path.lexists(folder):
            say(f"skipping a damaged checkpoint: {error}")
        return False
    return True


def newest_valid(run: Path, say: Say = silent) -> Path | None:
    """The newest checkpoint of a run that verifies; `say` hears of each one skipped and why.

    Raises Replaced where none is left of those that were there.
    """
    there = checkpoints_of(run)
    chosen = next((path for path in there if is_whole(path, say)), None)
    if chosen is None and there and checkpoints_of(run) != there:
        raise Replaced(there[0])
    return chosen


@dataclass(frozen=True)
class Best:
    """Which checkpoint validated best."""

    step: int
    loss: float
    """Its validation loss, nats per token."""


def record_best(run: Path, best: Best) -> None:
    """Write best.json, whole or not at all. The checkpoint must be there already."""
    write_text(run / BEST, to_json(sealed({"step": best.step, "loss": best.loss})))


def read_best(run: Path) -> Best | None:
    """What best.json says; None where there is none, or a damaged one."""
    try:
        record = read_json(run / BEST)
    except CheckpointError:
        return None
    step, loss = record.get("step"), record.get("loss")
    sound = type(step) is int and type(loss) is float and is_intact(record)
    return Best(step, loss) if sound else None  # type: ignore[arg-type]


def best_or_newest(run: Path, say: Say = silent) -> Path | None:
    """The best checkpoint of a run where one is recorded and verifies, else the newest that verifies.

    `say` hears of it where the best is not the newest, and of each one skipped and why. Raises Replaced where the run
    recorded another best meanwhile, or none is left of those that were there.
    """
    best = read_best(run)
    if best is None and (run / BEST).exists() and (best := read_best(run)) is None:
        say(f"{run / BEST}: was altered or cannot be read, so the newest checkpoint is taken")
    there = checkpoints_of(run)
    if best is not None:
        chosen = next((path for path in there if step_of(path) == best.step), None)
        if chosen is not None and is_whole(chosen, say):
            if chosen != there[0]:
                say(f"{run}: step {best.step} validated best ({best.loss:.4f}); name {there[0]} to have the newest")
            return chosen
        if read_best(run) != best:
            raise Replaced(chosen or run)
        if chosen is None:
            say(f"{run}: its best checkpoint, of step {best.step}, is gone; the newest is taken")
    return newest_valid(run, say)


EXPECTED = "a run, a checkpoint folder or a Hugging Face folder"


def find_checkpoint(path: Path | str, say: Say = silent) -> Path:
    """The checkpoint folder that a path means: the best one of a run (see `best_or_newest`), or the folder itself.

    Raises CheckpointError saying what is there and what was expected.
    """
    path = named_path(path, EXPECTED)
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        chosen = best_or_newest(path, say)
        if chosen is None:
            raise CheckpointError(f"{path}: this run holds no finished checkpoint yet")
        return chosen
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give {EXPECTED}{_kept_beside(path)}")
    there = sorted(child.name for child in path.iterdir())[:8] if path.is_dir() else "a file"
    raise CheckpointError(
        f"{path}: is no checkpoint (expected config.json with model.safetensors, or checkpoints/); it holds {there}"
    )


def _kept_beside(path: Path) -> str:
    """What a run keeps, for who names a checkpoint that it no longer has."""
    kept = [folder.name for folder in checkpoints_of(path.parent.parent)] if path.parent.name == "checkpoints" else []
    return f"; {path.parent} holds {', '.join(kept)}" if kept else ""


def read_checkpoint(path: Path | str, read: Callable[[Path], Made], say: Say = silent) -> Made:
    """What `read` makes of the checkpoint that a path means, all of it from one checkpoint.

    A run in training replaces its checkpoints: of a run, one that is gone or changed before it is read is left for the
    one that stands then, a few times. A checkpoint that was named itself is never exchanged for another.

    Args:
        path: see `find_checkpoint`.
        read: reads a checkpoint folder; what it raises of one that stays as it is, is raised.
        say: as of `best_or_newest`, about the checkpoint that is taken in the end.

    Raises:
        CheckpointError: see `find_checkpoint`; or the checkpoint did not stay until it was read (Replaced).
    """
    for tries_left in reversed(range(TRIES)):
        said: list[str] = []
        try:
            return _read_unchanged(find_checkpoint(path, said.append), read)
        except Replaced:
            said.clear()
            if not tries_left or not (Path(path) / "checkpoints").is_dir():
                raise
        finally:
            for line in said:
                say(line)
    raise AssertionError("unreachable")


def _read_unchanged(folder: Path, read: Callable[[Path], Made]) -> Made:
    """What `read` makes of a folder. Raises Replaced where the folder did not stay as it was."""
    before, failed = signature_of(folder), None
    try:
        made = read(folder)
    except Exception as error:  # whatever it is, of a folder that is gone or half gone it tells nothing
        failed = error
    if not folder.is_dir() or signature_of(folder) != before:
        raise Replaced(folder) from failed
    if failed is not None:
        raise failed
    return made


# What was measured while it trained.


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
