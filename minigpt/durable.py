"""Writing that survives: synced, whole or not at all, and the system's words about disks turned into ours."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.errors import DiskError


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):  # some systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn the operating system's words about a disk into one line that says what to do."""
    try:
        yield
    except Exception as error:  # safetensors reports a full disk as an error of its own
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC or "No space left" in str(error):
            raise DiskError(f"{what}: the disk is full; free some space and start again with --resume auto") from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"{what}: not writable ({error}); choose another folder with --runs_dir") from error
        raise DiskError(f"{what}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all: temporary sibling, sync, rename."""
    with disk_errors(str(path)):
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)


def to_json(value: Any) -> str:
    """JSON as we write it: indented, non-ASCII as it is, NaN refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
