"""Named corpora: data/corpora.yaml, their download, and built-in ones."""

from __future__ import annotations

import http.client
import os
import secrets
import string
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minigpt.data.reading import BLOCK, Piece
from minigpt.durable import file_sha256
from minigpt.errors import DataError, DiskError
from minigpt.terminal import progress

BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
TIMEOUT = 10.0  # seconds without a connection or data after which a download fails


def catalogue() -> dict[str, dict[str, Any]]:
    """Read the entries of data/corpora.yaml, by name."""
    package = Path(__file__).parents[1]
    places = (package / "_shipped" / "data" / "corpora.yaml", package.parent / "data" / "corpora.yaml")
    for place in places:
        if place.is_file():
            return yaml.safe_load(place.read_text(encoding="utf-8"))
    raise DataError(f"corpora.yaml is missing at {places[0]} and {places[1]}; reinstall minigpt")


def python_topics() -> list[str]:
    """The help topics of the running Python, sorted by name; one document each."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "data.source 'pydocs' needs the module pydoc_data, which this Python lacks (some systems package it "
            "separately, with the full standard library or the docs); install it, or use --data.source FILE"
        ) from error
    return [topics[name] for name in sorted(topics)]


def topic_pieces(topics: list[str]) -> Iterator[Piece]:
    """Yield the topics as documents."""
    for text in topics:
        yield Piece(text, True)


def repeated_blocks(documents: int, length: int, shortest: int, longest: int, seed: int) -> Iterator[Piece]:
    """Generate documents that repeat a random block of characters, so that only the repetition is predictable.

    The characters are uniformly random from the base64 alphabet. The same arguments give the same text on any machine.

    Args:
        documents: number of documents.
        length: characters per document.
        shortest: minimum characters per block.
        longest: maximum characters per block; lengths are uniformly distributed, so that the distance back varies.
        seed: seed of the text.
    """
    for words in np.random.Philox(key=seed).random_raw((documents, longest + 1)).tolist():
        block = "".join(BASE64[word >> 58] for word in words[: shortest + words[-1] % (longest - shortest + 1)])
        yield Piece((block * (length // len(block) + 1))[:length], True)


def check_copy(name: str, entry: dict[str, Any], path: Path, what: str) -> None:
    """Raise DataError if a file is not the named corpus.

    Args:
        name: name of the corpus.
        entry: its entry in the catalogue.
        path: the file.
        what: description of the file for the message.
    """
    try:
        size, found = path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error}") from error
    if found != entry["sha256"]:
        raise DataError(
            f"{what} is not the corpus {name!r}: it has {size} bytes with sha256 {found}, expected {entry['bytes']} "
            f"bytes with sha256 {entry['sha256']}; get the right file elsewhere and give it with --data.file PATH"
        )


def download(name: str, entry: dict[str, Any], path: Path, show: bool = True) -> None:
    """Download a named corpus to a temporary file, unpack it, verify its sha256, and rename it.

    Args:
        name: name of the corpus.
        entry: its entry in the catalogue.
        path: path of the text file to create.
        show: whether to show progress.

    Raises:
        DataError: the URL cannot be reached, or the download is not the corpus.
        DiskError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    archive = part.with_suffix(".zip")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(name, entry, archive if "member" in entry else part, show)
        if "member" in entry:
            _unpack(name, entry, archive, part)
        check_copy(name, entry, part, f"the download from {entry['url']}")
        os.replace(part, path)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error}; free some space or use another --data.folder") from error
    finally:
        part.unlink(missing_ok=True)
        archive.unlink(missing_ok=True)


def _fetch(name: str, entry: dict[str, Any], path: Path, show: bool) -> None:
    received = _received(name, entry["url"])
    total = next(received)
    with path.open("wb") as file, progress(f"downloading {name}", total, "bytes", show=show) as bar:
        done = 0
        for block in received:
            done += file.write(block)
            bar.update(done)
            if done > 2 * entry["bytes"]:
                break  # too large to be the corpus; the sha256 check will fail
        file.flush()
        os.fsync(file.fileno())


def _received(name: str, url: str) -> Iterator[Any]:
    """Yield the size announced by the server (or None), then the blocks of data."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            yield int(length) if length else None
            while block := response.read(BLOCK // 16):
                yield block
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(
            f"corpus {name!r} could not be downloaded from {url} ({error}); check the connection, or get it "
            "elsewhere and give the file with --data.file PATH"
        ) from error


def _unpack(name: str, entry: dict[str, Any], archive: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(entry["member"]) as member, path.open("wb") as file:
            while (block := member.read(BLOCK)) and file.tell() <= entry["bytes"]:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(
            f"the download from {entry['url']} for corpus {name!r} is not a .zip with a valid {entry['member']!r} "
            f"({error}); get the text elsewhere and give it with --data.file PATH"
        ) from error
