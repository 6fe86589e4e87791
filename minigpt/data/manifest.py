"""The folder of a prepared corpus: created atomically, with a manifest that has its own checksum."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.durable import disk_errors, is_intact, sealed, sync, to_json, write_text
from minigpt.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
_UNFINISHED = ".preparing-"
_STALE = 86400  # seconds after which an unfinished folder of a killed process is removed


@contextmanager
def appearing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` at the end; an error or Ctrl-C removes it."""
    temporary = folder.with_name(f"{_UNFINISHED}{secrets.token_hex(4)}")
    try:
        with disk_errors(f"the corpus {folder}", "free some space or use another --data.folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder.parent)
            temporary.mkdir()
            yield temporary
            sync(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.exists():  # otherwise another process prepared the same corpus first
                    raise
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Remove unfinished folders that are older than _STALE seconds."""
    for left in home.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            if left.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(left, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json atomically, with the sha256 of its content."""
    write_text(folder / MANIFEST, to_json(sealed(manifest)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json, without its hash. Raises DataError if it is missing, unreadable or modified."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a prepared corpus ({MANIFEST} is missing); create one with minigpt prepare")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(f"{path} has format {manifest['format']}, expected {FORMAT}; prepare the corpus again")
        intact = is_intact(manifest)
        del manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); delete {folder} and prepare the corpus again") from error
    if not intact:
        raise DataError(f"{path} was modified; delete {folder} and prepare the corpus again")
    return manifest
