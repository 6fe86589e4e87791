"""The manifest of a checkpoint: size and sha256 of every file; writing and verifying it.

What a process has verified it remembers, by the sizes and times of the files, so that nothing is read twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minigpt import __version__
from minigpt.checkpoint.formats import FORMAT, check_format
from minigpt.durable import (
    file_sha256,
    is_intact,
    parse_json,
    read_text,
    sealed,
    sync,
    to_json,
)
from minigpt.errors import CheckpointError

MANIFEST = "manifest.json"


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
    signature = signature_of(folder)  # before reading: a file that changes meanwhile is read again the next time
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


def signature_of(folder: Path) -> tuple:
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
    if not known or known != signature_of(folder):
        verify(folder)
