"""A config's `source` -> a stream of documents, with a fingerprint that detects changes without reading the text."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minigpt.data.catalogue import catalogue, check_copy, download, python_topics, repeated_blocks, topic_pieces
from minigpt.data.config import DataConfig
from minigpt.data.decoding import NotText, ReadingLog
from minigpt.data.listing import Listing, list_folder, list_pattern
from minigpt.data.reading import BLOCK, COMPRESSED, Piece, check_readers, read_documents, readers_of, standard_input
from minigpt.durable import canonical_json, file_sha256, sha256_of
from minigpt.errors import ConfigError, DataError, DiskError


@dataclass(frozen=True)
class Source:
    """A resolved source of documents that has not been read yet."""

    name: str
    """Name of the folder of the prepared corpus."""
    fingerprint: dict[str, Any]
    """Identifies the text: paths, sizes and modification times, or a known sha256."""
    bytes: int
    """Bytes to read from disk, for the progress bar; 0 if unknown."""
    documents: Callable[[ReadingLog], Iterator[Piece]]
    """Returns a new stream of the documents; can be called several times."""
    settle: Callable[[bool], None] = lambda show: None
    """Downloads and checks the text before the first read; the argument is whether to show progress."""


def find_source(data: DataConfig) -> Source:
    """Resolve `data.source`. Standard input is read to its end.

    Raises:
        ConfigError: `source` is neither a known name nor an existing path, or `file` cannot be used with it.
        DataError: the text cannot be read.
    """
    data.check()
    named = catalogue()
    if data.source in named:
        return _named(data.source, named[data.source], data)
    if data.file is not None:
        raise ConfigError(
            f"data.file {data.file!r} needs a named corpus, but data.source {data.source!r} is not one; "
            f"use --data.source {data.file}, or one of: {', '.join(named)}"
        )
    if data.source == "-":
        return _standard_input(data)
    path = Path(data.source).expanduser()
    if os.path.isdir(path):
        return _folder(_folder_name(path.resolve().name, data.source), path, data, f"data.source {data.source!r}")
    if os.path.isfile(path):
        return _files(_folder_name(_stem(path), data.source), Listing([path]), path.parent, data, many=False)
    if glob.has_magic(data.source):
        listing = list_pattern(str(path))
        if not listing.files:
            raise DataError(
                f"data.source {data.source!r} matches no file{_beside(listing)}; check the pattern and the current "
                "folder"
            )
        return _files(_folder_name(data.source, data.source), listing, Path("."), data, many=True)
    try:
        os.stat(path)
        raise DataError(f"data.source {data.source!r} is not a regular file; pipe it in with --data.source -")
    except PermissionError as error:
        raise DataError(f"data.source {data.source!r} cannot be read: {error}") from error
    except (OSError, ValueError):
        pass  # does not exist
    near = get_close_matches(data.source, named, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"data.source {data.source!r} is neither a file, a folder nor a known corpus; {hint}"
        f"known corpora: {', '.join(named)}"
    )


def _folder_name(name: str, source: str) -> str:
    """Make a name safe for a folder (no path separators, no leading dots); a hash if nothing is left."""
    if not name:
        raise ConfigError(f"data.source {source!r} has no file name for the corpus folder; give a file or a folder")
    safe = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    return safe or f"text-{sha256_of(name)[:8]}"


def _stem(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in COMPRESSED:
        name = Path(name).stem
    return Path(name).stem


def _named(name: str, entry: dict[str, Any], data: DataConfig) -> Source:
    if _folder_name(name, name) != name:
        raise ConfigError(f"data/corpora.yaml: {name!r} is not a valid folder name; rename the corpus there")
    if entry["kind"] in ("pydocs", "repeats") and data.file is not None:
        raise ConfigError(f"data.file {data.file!r} cannot be used with data.source {name!r}, which is not downloaded")
    if entry["kind"] == "repeats":
        return Source(name, {"name": name, **entry["made"]}, 0, lambda log: repeated_blocks(**entry["made"]))
    if entry["kind"] == "pydocs":
        topics = python_topics()
        text_sha256 = hashlib.sha256("\0".join(topics).encode()).hexdigest()
        fingerprint = {"name": name, "python": sys.version.split()[0], "sha256": text_sha256}
        return Source(name, fingerprint, 0, lambda log: topic_pieces(topics))
    if entry["kind"] == "supplied":
        return _supplied(name, entry, data)
    file_name = entry.get("member") or Path(entry["url"]).name
    path = Path(data.file).expanduser() if data.file else Path(data.folder) / name / "source" / file_name

    def settle(show: bool) -> None:
        if data.file is not None:
            check_copy(name, entry, path, f"data.file {data.file!r}")
        elif not path.is_file() or file_sha256(path) != entry["sha256"]:
            download(name, entry, path, show)

    fingerprint = {"name": name, "sha256": entry["sha256"]}
    return Source(name, fingerprint, entry["bytes"], lambda log: read_documents(path, data, log), settle)


def _supplied(name: str, entry: dict[str, Any], data: DataConfig) -> Source:
    """A named corpus that is too large to download automatically: the user gives a file or folder."""
    if data.file is None:
        raise DataError(
            f"data.source {name!r} is not downloaded automatically; get it from {entry['url']} and give the file or "
            f"folder (text, .jsonl, .gz, .zst) with --data.file PATH, or use another --data.source"
        )
    path = Path(data.file).expanduser()
    if os.path.isdir(path):
        return _folder(name, path, data, f"data.file {data.file!r}")
    return _files(name, Listing([path]), path.parent, data, many=False)


def _folder(name: str, path: Path, data: DataConfig, what: str) -> Source:
    listing = list_folder(path, Path(data.folder))
    if not listing.files:
        raise DataError(f"{what} is a folder without text files{_beside(listing)}; put text files into it")
    return _files(name, listing, path, data, many=True)


def _beside(listing: Listing) -> str:
    return f" (skipped: {', '.join(listing.left_out[:3])})" if listing.left_out else ""


def _files(name: str, found: Listing, base: Path, data: DataConfig, many: bool) -> Source:
    """Create a source from files. With `many`, files that are not text are skipped."""
    sizes, listing, files = 0, hashlib.sha256(), found.files
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        sizes += status.st_size
        listing.update(canonical_json([os.path.relpath(file, base), status.st_size, status.st_mtime_ns]).encode())
    fingerprint = {
        "path": str(files[0] if len(files) == 1 else base),
        "files": len(files),
        "bytes": sizes,
        "listing_sha256": listing.hexdigest(),
    }
    if readers := readers_of(files, data):
        fingerprint["readers"] = readers

    def documents(log: ReadingLog) -> Iterator[Piece]:
        log.skipped += found.left_out
        for file in files:
            try:
                yield from read_documents(file, data, log)
            except NotText:
                if not many:
                    raise
                log.skipped.append(str(file))

    return Source(name, fingerprint, sizes, documents, lambda show: check_readers(files))


def _standard_input(data: DataConfig) -> Source:
    """Save standard input to a file named after its hash, so that it can be read twice."""
    piped = standard_input()
    folder = Path(data.folder) / "stdin" / "source"
    spool = folder / f".{secrets.token_hex(4)}.part"
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with spool.open("wb") as file:
            while block := piped.read(BLOCK):
                digest.update(block)
                file.write(block)
            size = file.tell()
        if not size:
            raise DataError("data.source '-': standard input is empty; pipe a text into it: cat FILE | minigpt ...")
        path = folder / f"{digest.hexdigest()[:16]}.txt"
        os.replace(spool, path)
    except OSError as error:
        raise DiskError(f"cannot write to {folder}: {error}; free some space or use another --data.folder") from error
    finally:
        spool.unlink(missing_ok=True)
    fingerprint = {"path": "-", "sha256": digest.hexdigest()}
    return Source("stdin", fingerprint, size, lambda log: read_documents(path, data, log))
