"""Delete old checkpoints and the leftovers of interrupted saves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from minigpt.checkpoint.runs import checkpoints_of, is_whole, refuse_link, step_of
from minigpt.durable import (
    disk_errors,
    probe_writing,
    sync,
)


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
    """Before a run resumes: remove leftovers and find out now, not at the first save, whether it can be written to.

    Raises DiskError.
    """
    remedy = "mend it, or choose another --runs_dir"
    folder = run / "checkpoints"
    refuse_link(folder, run)
    with disk_errors(str(folder), remedy):
        folder.mkdir(exist_ok=True)
    clean_leftovers(run)
    for each in (run, folder):
        probe_writing(each, remedy)
    with disk_errors(str(run), remedy):
        for each in (run, run.parent):  # the names of new folders last too
            sync(each)
