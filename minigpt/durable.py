"""Durable writing: synced, atomic, with checksums; disk errors become one-line errors with a remedy."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.errors import ConfigError, DiskError


def named_path(value: Any, what: str) -> Path:
    """Return `value` as a Path. Raises ConfigError for "" (the current folder to pathlib) and for other types.

    Args:
        value: a string or path, as given by the user.
        what: what the path should point to, for the message.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        told = repr(value) if isinstance(value, (str, bool, int, float, type(None))) else type(value).__name__
        raise ConfigError(f"{told}: expected the path of {what}")
    return Path(value)


def file_sha256(path: Path) -> str:
    """Sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Canonical JSON of a value: sorted keys, no spaces, non-ASCII characters unescaped (see `json_text`)."""
    return json_text(value, sort_keys=True, separators=(",", ":"))


def json_text(value: Any, encoding: str = "utf-8", **style: Any) -> str:
    """Encode as JSON with non-ASCII characters unescaped, or all escaped as \\uXXXX if `encoding` cannot represent one.

    UTF-8 cannot represent lone surrogates, which Python uses for the bytes of a file name that is not UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False, **style)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, **style)
    return text


def sha256_of(value: Any) -> str:
    """Sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with a "sha256" key: the hash of all other keys, so that later changes are detected."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return {**content, "sha256": sha256_of(content)}


def is_intact(record: dict[str, Any]) -> bool:
    """Whether a sealed record still matches its hash."""
    return record.get("sha256") == sealed(record)["sha256"]


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync). A file is also dropped from the page cache, so reads come from disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise") and path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):  # some systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def mount_of(path: Path) -> Path:
    """Mount point of the file system that holds `path`, or its nearest existing parent folder."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    while not os.path.ismount(path):
        path = path.parent
    return path


def space(path: Path, needed: int | None = None) -> str:
    """Describe the needed and the free disk space at `path`: '12.3 MB needed, 4.5 MB free on /data'."""
    mount = mount_of(path)
    free = f"{shutil.disk_usage(mount).free / 1e6:.1f} MB free on {mount}"
    return free if needed is None else f"{needed / 1e6:.1f} MB needed, {free}"


def check_space(path: Path, needed: int) -> None:
    """Raise DiskError if the disk of `path` has fewer than `needed` bytes free."""
    if shutil.disk_usage(mount_of(path)).free < needed:
        raise DiskError(f"{path}: {space(path, needed)}; free some space; files saved earlier are untouched")


def _figures(what: str, needed: int | None) -> str:
    return f" ({space(Path(what), needed)})" if Path(what).parent.exists() else ""  # `what` may be more than a path


@contextmanager
def disk_errors(
    what: str, remedy: str = "files saved earlier are untouched", needed: int | None = None
) -> Iterator[None]:
    """Convert OS errors about a disk into a one-line DiskError that says what to do.

    Args:
        what: the file or folder being written.
        remedy: what to do once space is free, or with another folder.
        needed: bytes to be written, if known.
    """
    try:
        yield
    except Exception as error:  # safetensors has its own error type for a full disk, with the errno in its text
        if isinstance(error, DiskError) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # report the outer `what` (say, the folder), not the single file inside it
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number == errno.ENOSPC or "No space left" in str(error):
            raise DiskError(f"{what}: the disk is full{_figures(what, needed)}; free some space; {remedy}") from error
        if number in (errno.EDQUOT, errno.EFBIG):
            raise DiskError(
                f"{what}: a disk quota or file size limit (ulimit -f) was reached{_figures(what, needed)}; raise it; "
                f"{remedy}"
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"{what}: not writable ({error}); choose another folder") from error
        raise DiskError(f"{what}: cannot be written ({error}); {remedy}") from error


def probe_writing(folder: Path, remedy: str) -> None:
    """Write, sync and delete a small file, to find out early if the folder is not writable."""
    path = folder / f".probe.{secrets.token_hex(4)}"
    with disk_errors(str(folder), remedy):
        try:
            with open(path, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically: temporary file in the same folder, sync, rename."""
    with disk_errors(str(path)):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


held: set[int] = set()  # file descriptors of the locks that this process holds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process inside a `with` block. Raises ConfigError if another process holds the lock.

    The OS releases the lock however the process ends, so stale locks cannot occur. Child processes that inherit a
    descriptor in `held` also hold the lock, until the last of them has ended.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock: the user must not start two processes on one run
        yield
        return
    with disk_errors(str(folder / ".lock"), "or choose another folder"):
        opened = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - the next line closes it
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"{folder}: in use by {holder}; wait for it to end, or choose another --run_name"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        held.add(file.fileno())
        try:
            yield
        finally:
            held.discard(file.fileno())


def to_json(value: Any) -> str:
    """Encode as indented JSON with non-ASCII unescaped (see `json_text`). Raises ValueError for NaN and infinity."""
    return json_text(value, indent=2, allow_nan=False) + "\n"


MOST_JSON = 64 << 20  # largest JSON file read, in bytes; a vocabulary of a quarter million tokens takes 20 MB


def read_text(path: Path, most: int = MOST_JSON) -> str:
    """Read a text file of at most `most` bytes. Raises ValueError for a longer one, and OSError as `open` does."""
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size} bytes; the limit is {most}")
    return path.read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Parse strict JSON. Raises ValueError for duplicate keys, NaN, Infinity and too deep nesting."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a valid JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
