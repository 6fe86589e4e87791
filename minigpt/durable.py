"""Writing that survives: synced, whole or not at all, sealed by hashes; the words about disks turned into ours."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.errors import ConfigError, DiskError


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, characters as themselves."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_of(value: Any) -> str:
    """Sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the sha256 of all the rest of it, so that a later change shows."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return {**content, "sha256": sha256_of(content)}


def is_intact(record: dict[str, Any]) -> bool:
    """Whether a sealed record says what it said when it was sealed."""
    return record.get("sha256") == sealed(record)["sha256"]


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):  # some systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(what: str, remedy: str = "what was saved before is untouched") -> Iterator[None]:
    """Turn the operating system's words about a disk into one line that says what to do.

    Args:
        what: the file or folder being written.
        remedy: what to do once there is space, or with another folder.
    """
    try:
        yield
    except Exception as error:  # safetensors reports a full disk as an error of its own
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskError(f"{what}: the disk is full; free some space; {remedy}") from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"{what}: not writable ({error}); choose another folder") from error
        raise DiskError(f"{what}: cannot be written ({error}); {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all: temporary sibling, sync, rename."""
    with disk_errors(str(path)):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, for as long as it lives. Raises ConfigError where another process holds it.

    The system lets the lock go however the process ends, so none is ever left behind.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two processes on one run are the user's to avoid
        yield
        return
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{folder}: is in use by {holder}; wait for it, or choose another --run_name") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def to_json(value: Any) -> str:
    """JSON as we write it: indented, non-ASCII as it is, NaN refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
