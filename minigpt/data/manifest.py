"""The folder of a prepared corpus as a file-system matter: it appears whole or not at all; its manifest is sealed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.errors import DataError, DiskError
from minigpt.tokenizer.base import sha256_of

FORMAT = 1
MANIFEST = "manifest.json"
_UNFINISHED = ".preparing-"
_STALE = 86400  # seconds after which a folder that a killed process left unfinished is removed


@contextmanager
def appearing_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when all is written; an error or Ctrl-C leaves nothing."""
    temporary = folder.with_name(f"{_UNFINISHED}{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        temporary.mkdir()
        yield temporary
        _sync_folder(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # otherwise another process prepared the same corpus first
                raise
        _sync_folder(folder.parent)
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise DiskError(
            f"cannot write the corpus {folder}: {what}; free space or name another --data.folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Remove what a killed process left half done more than a day ago."""
    for left in home.glob(f"{_UNFINISHED}*"):
        if left.stat().st_mtime < time.time() - _STALE:
            shutil.rmtree(left, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json at once, sealed with the sha256 of its own content."""
    sealed = {key: value for key, value in manifest.items() if key != "sha256"}
    sealed["sha256"] = sha256_of(sealed)
    part = folder / f".{MANIFEST}.{secrets.token_hex(4)}"
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json says, less its seal. A missing, unreadable or altered one is a DataError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} holds no prepared corpus ({MANIFEST} is missing); make one with minigpt prepare")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sealed = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise DataError(f"{path} has format {manifest['format']}, expected {FORMAT}; prepare the corpus again")
        intact = sealed == sha256_of(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); delete {folder} and prepare the corpus again") from error
    if not intact:
        raise DataError(f"{path} was altered; delete {folder} and prepare the corpus again")
    return manifest
