"""The checkpoints of a run: which are whole, which is the newest, which is the best, and which may go.

    runs/NAME/
        metrics.jsonl                       what was measured while it trained, one object a row
        best.json                           step and validation loss of the best checkpoint, sealed by its own sha256
        checkpoints/step-00000500/          a checkpoint: its manifest.json is written last, and covers every byte

What a process has verified it remembers, by the sizes and times of the files, so that pruning reads nothing twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minigpt import __version__
from minigpt.checkpoint.formats import FORMAT, check_format
from minigpt.durable import (
    disk_errors,
    file_sha256,
    is_intact,
    named_path,
    parse_json,
    probe_writing,
    read_text,
    sealed,
    sync,
    to_json,
    write_text,
)
from minigpt.errors import CheckpointError

MANIFEST = "manifest.json"
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


# One checkpoint.


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, naming the file, for anything else."""
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); use an earlier checkpoint, or copy it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; use an earlier checkpoint or copy it again")
    return value


def write_manifest(folder: Path) -> None:
    """The last file of a checkpoint: size and sha256 of every other one, and of itself."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    manifest = sealed({"format": FORMAT, "minigpt": __version__, "files": entries})
    (folder / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    sync(folder / MANIFEST)


def verify(folder: Path) -> None:
    """Check every file against the manifest. Raises CheckpointError that names the first file that differs."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished; use an earlier checkpoint")
    manifest = read_json(path)
    check_format(manifest.get("format"), str(path), manifest.get("minigpt"))
    if not is_intact(manifest) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: was altered (its own checksum differs); use an earlier checkpoint")
    signature = _signature(folder)  # before reading: a file that changes meanwhile is read again the next time
    for name, entry in manifest["files"].items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: is missing or no plain file; use an earlier checkpoint")
        if not isinstance(entry, dict) or file.stat().st_size != entry.get("bytes"):
            told = entry.get("bytes") if isinstance(entry, dict) else entry
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, {told} were written; use an earlier checkpoint"
            )
        try:
            found = file_sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); use an earlier checkpoint") from error
        if found != entry.get("sha256"):
            raise CheckpointError(f"{file}: was altered (sha256 differs from the manifest); use an earlier checkpoint")
    _verified[str(folder.absolute())] = signature


_verified: dict[str, tuple] = {}
READ = (".json", ".safetensors", ".yaml")  # what a checkpoint is made of


def _signature(folder: Path) -> tuple:
    """What changes when one of the files that are read does, as far as can be seen without reading it."""
    try:
        files = [entry for entry in os.scandir(folder) if Path(entry.name).suffix in READ and not entry.is_dir()]
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in files]
    except OSError:  # it cannot be listed, or goes just now
        return ()
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in found))


def verify_once(folder: Path) -> None:
    """As `verify`, but files that this process has verified and that did not change since are not read again."""
    known = _verified.get(str(folder.absolute()))
    if not known or known != _signature(folder):
        verify(folder)


# All of a run.


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first, finished or not.

    Raises CheckpointError where checkpoints/ is a link that leads out of the run.
    """
    folder = run / "checkpoints"
    _refuse_link(folder, run)
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step-"))


def _refuse_link(path: Path, run: Path) -> None:
    target = path.resolve()
    if path.is_symlink() and not target.is_relative_to(run.resolve()):
        raise CheckpointError(
            f"{path}: is a link that leads out of the run, to {target}; put the folder itself there, or name the target"
        )


def is_whole(folder: Path, say: Say = silent) -> bool:
    """Whether a checkpoint of a run verifies and is no link to elsewhere; `say` hears why not, unless it has gone."""
    try:
        _refuse_link(folder, folder.parent.parent)
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
    """Its validation loss, nats a token."""


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
    before, failed = _signature(folder), None
    try:
        made = read(folder)
    except Exception as error:  # whatever it is, of a folder that is gone or half gone it tells nothing
        failed = error
    if not folder.is_dir() or _signature(folder) != before:
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


# Making room.


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints that verify and the one of step `best`, and clean up.

    A damaged one is left for a person to look at; it never counts as one of those kept. One that goes loses its name
    first, so that a kill in between leaves nothing that looks like a checkpoint.
    """
    kept = 0
    for path in checkpoints_of(run):
        if kept < keep:
            kept += is_whole(path)
            continue
        if step_of(path) == best:
            continue
        with contextlib.suppress(OSError):  # it goes the next time
            os.rename(path, path.with_name(f".tmp-{path.name}-pruned"))
    clean_leftovers(run)


def clean_leftovers(run: Path) -> None:
    """Remove what was killed half way: folders of saves and of prunings, temporary siblings of small files."""
    for path in (run / "checkpoints").glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in (run, run / "samples", run / "checkpoints"):
        for path in folder.glob(".*.????????"):
            if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) and path.is_file():
                path.unlink(missing_ok=True)


def make_ready(run: Path) -> None:
    """Before a run goes on: remove leftovers and find out now, not at the first save, whether it can be written to.

    Raises DiskError.
    """
    remedy = "mend it, or choose another --runs_dir"
    folder = run / "checkpoints"
    _refuse_link(folder, run)
    with disk_errors(str(folder), remedy):
        folder.mkdir(exist_ok=True)
    clean_leftovers(run)
    for each in (run, folder):
        probe_writing(each, remedy)
    with disk_errors(str(run), remedy):
        for each in (run, run.parent):  # the names of new folders last too
            sync(each)
