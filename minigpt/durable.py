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
    """`value` as a path. Raises ConfigError for "", which to pathlib is the current folder, and for what is no path.

    Args:
        value: as it was given.
        what: the path of what was expected.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        told = repr(value) if isinstance(value, (str, bool, int, float, type(None))) else type(value).__name__
        raise ConfigError(f"{told}: an empty path; expected the path of {what}")
    return Path(value)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, characters as themselves (see `json_text`)."""
    return json_text(value, sort_keys=True, separators=(",", ":"))


def json_text(value: Any, encoding: str = "utf-8", **style: Any) -> str:
    """JSON with characters as themselves, or all but ASCII as \\uXXXX where the encoding lacks one of them.

    UTF-8 lacks lone surrogates: a byte of a file name that is no UTF-8 is one in Python.
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
    """The record with the sha256 of all the rest of it, so that a later change shows."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return {**content, "sha256": sha256_of(content)}


def is_intact(record: dict[str, Any]) -> bool:
    """Whether a sealed record says what it said when it was sealed."""
    return record.get("sha256") == sealed(record)["sha256"]


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk; a file is then read from there, not from the memory's copy."""
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
    """The mount point of the file system that `path`, or its nearest folder that exists, lies on."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    while not os.path.ismount(path):
        path = path.parent
    return path


def space(path: Path, needed: int | None = None) -> str:
    """What is needed and what is free there: '12.3 MB needed, 4.5 MB free on /data'."""
    mount = mount_of(path)
    free = f"{shutil.disk_usage(mount).free / 1e6:.1f} MB free on {mount}"
    return free if needed is None else f"{needed / 1e6:.1f} MB needed, {free}"


def check_space(path: Path, needed: int) -> None:
    """Raise DiskError where fewer than `needed` bytes are free on the disk that `path` is to be written to."""
    if shutil.disk_usage(mount_of(path)).free < needed:
        raise DiskError(f"{path}: {space(path, needed)}; free some space; what was saved before is untouched")


def _figures(what: str, needed: int | None) -> str:
    return f" ({space(Path(what), needed)})" if Path(what).parent.exists() else ""  # `what` may be more than a path


@contextmanager
def disk_errors(
    what: str, remedy: str = "what was saved before is untouched", needed: int | None = None
) -> Iterator[None]:
    """Turn the operating system's words about a disk into one line that says what to do.

    Args:
        what: the file or folder being written.
        remedy: what to do once there is space, or with another folder.
        needed: bytes that are to be written, where that is known.
    """
    try:
        yield
    except Exception as error:  # safetensors reports a full disk as an error of its own, with the number in its text
        if isinstance(error, DiskError) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # it is told of the whole, not of the file in it
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        told = re.search(r"os error (\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number == errno.ENOSPC or "No space left" in str(error):
            raise DiskError(f"{what}: the disk is full{_figures(what, needed)}; free some space; {remedy}") from error
        if number in (errno.EDQUOT, errno.EFBIG):
            raise DiskError(
                f"{what}: a quota or a limit on file sizes (ulimit -f) is reached{_figures(what, needed)}; raise it; "
                f"{remedy}"
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"{what}: not writable ({error}); choose another folder") from error
        raise DiskError(f"{what}: cannot be written ({error}); {remedy}") from error


def probe_writing(folder: Path, remedy: str) -> None:
    """Write, sync and remove a small file, so that a folder that cannot be written to is found out at once."""
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


held: set[int] = set()  # descriptors of the locks that this process holds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, for as long as it lives. Raises ConfigError where another process holds it.

    The system lets the lock go however the process ends, so none is ever left behind. Processes that inherit a
    descriptor of `held` hold it too, until the last of them has ended.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two processes on one run are the user's to avoid
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
            raise ConfigError(f"{folder}: is in use by {holder}; wait for it, or choose another --run_name") from None
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
    """JSON as we write it: indented, non-ASCII as it is (see `json_text`), NaN refused."""
    return json_text(value, indent=2, allow_nan=False) + "\n"


MOST_JSON = 64 << 20  # bytes of JSON that are read; a vocabulary of a quarter million tokens has 20 MB


def read_text(path: Path, most: int = MOST_JSON) -> str:
    """A text file of at most `most` bytes. Raises ValueError for a longer one and OSError as `open` does."""
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size} bytes, more than the {most} that are read")
    return path.read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """JSON in the strict sense: a key twice, NaN, Infinity or a hundred thousand brackets are a ValueError."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
