"""A folder or a glob -> the files to read, and a report of what is skipped."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from minigpt.errors import DataError

DEEP = "**"  # matches any number of folders


@dataclass
class Listing:
    """Files that were found, and paths that were skipped."""

    files: list[Path] = field(default_factory=list)
    """Sorted by path."""
    left_out: list[str] = field(default_factory=list)
    """Skipped paths, each with the reason."""


def list_folder(folder: Path, excluded: Path) -> Listing:
    """List the files of a folder recursively, without hidden files and without the folder `excluded`.

    Links to files are followed. Links to folders are not, to avoid cycles.

    Raises:
        DataError: one of the folders cannot be read.
    """
    return _sorted(_find(folder, [DEEP], excluded.resolve(), Listing()))


def list_pattern(pattern: str) -> Listing:
    """List the files that match a pattern such as books/**/*.txt. * skips hidden files; ** follows no links.

    Raises:
        DataError: a folder on the way cannot be read.
    """
    parts = Path(pattern).parts
    plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:plain])
    return _sorted(_find(base, parts[plain:], None, Listing()) if base.is_dir() else Listing())


def _sorted(found: Listing) -> Listing:
    return Listing(sorted(set(found.files)), sorted(set(found.left_out)))


def _find(folder: Path, pattern: Sequence[str], excluded: Path | None, found: Listing) -> Listing:
    first, rest = pattern[0], pattern[1:]
    deep = first == DEEP
    if deep and rest:  # ** also matches zero folders
        _find(folder, rest, excluded, found)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error.strerror}); make it readable, or move it out of the data folder"
        ) from error
    for name in names:
        path = folder / name
        hidden = name.startswith(".") and not first.startswith(".")
        if hidden or not (deep or fnmatch(name, first)):
            continue
        if not os.path.isdir(path):
            if os.path.isfile(path):
                found.files += [] if rest else [path]
            elif not rest:
                found.left_out.append(f"{path} ({'a broken link' if path.is_symlink() else 'not a file'})")
        elif excluded is not None and path.resolve() == excluded:
            continue
        elif deep and path.is_symlink():
            found.left_out.append(f"{path} (a link to a folder)")
        elif deep or rest:
            _find(path, pattern if deep else rest, excluded, found)
        else:
            found.left_out.append(f"{path} (a folder; append /** to include its files)")
    return found
