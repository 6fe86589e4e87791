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
TIMEOUT = 10.0  # seconds without a connection, or without a byte, before a download is given up


def catalogue() -> dict[str, dict[str, Any]]:
    """The entries of data/corpora.yaml by name."""
    package = Path(__file__).parents[1]
    places = (package / "_shipped" / "data" / "corpora.yaml", package.parent / "data" / "corpora.yaml")
    for place in places:
        if place.is_file():
            return yaml.safe_load(place.read_text(encoding="utf-8"))
    raise DataError(f"the catalogue of corpora is in neither {places[0]} nor {places[1]}; install minigpt again")


def python_topics() -> list[str]:
    """The help topics of the running Python in the order of their names, one document each."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "data.source 'pydocs' needs the module pydoc_data, which this Python lacks (some systems package it apart, "
            "with the full standard library or its documentation); install that, or name a text: --data.source FILE"
        ) from error
    return [topics[name] for name in sorted(topics)]


def topic_pieces(topics: list[str]) -> Iterator[Piece]:
    """The topics as documents."""
    for text in topics:
        yield Piece(text, True)


def repeated_blocks(documents: int, length: int, shortest: int, longest: int, seed: int) -> Iterator[Piece]:
    """Documents in which a block of random characters comes again and again: nothing but themselves foretells them.

    The characters are those of base64, each as likely. The same numbers give the same text, everywhere.

    Args:
        documents: how many.
        length: characters of each.
        shortest: characters of a block, at least.
        longest: at most; each length is as likely, so that how far back to look differs.
        seed: another gives another text.
    """
    for words in np.random.Philox(key=seed).random_raw((documents, longest + 1)).tolist():
        block = "".join(BASE64[word >> 58] for word in words[: shortest + words[-1] % (longest - shortest + 1)])
        yield Piece((block * (length // len(block) + 1))[:length], True)


def check_copy(name: str, entry: dict[str, Any], path: Path, what: str) -> None:
    """Refuse a file that is not the named corpus.

    Args:
        name: of the corpus.
        entry: its entry in the catalogue.
        path: the file.
        what: what the message calls it.
    """
    try:
        size, found = path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error}") from error
    if found != entry["sha256"]:
        raise DataError(
            f"{what} is not the corpus {name!r}: it has {size} bytes with sha256 {found}, expected {entry['bytes']} "
            f"bytes with sha256 {entry['sha256']}; fetch the right one elsewhere and name it with --data.file PATH"
        )


def download(name: str, entry: dict[str, Any], path: Path, show: bool = True) -> None:
    """Fetch a named corpus, unpack it, check it, and only then give it its name.

    Args:
        name: of the corpus.
        entry: its entry in the catalogue.
        path: where its text shall be.
        show: whether to show progress.

    Raises:
        DataError: the address cannot be reached, or what came is not the corpus.
        DiskError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    archive = part.with_suffix(".zip")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(name, entry, archive if "member" in entry else part, show)
        if "member" in entry:
            _unpack(name, entry, archive, part)
        check_copy(name, entry, part, f"what came from {entry['url']}")
        os.replace(part, path)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error}; free space or name another --data.folder") from error
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
                break  # whatever this is, it is not the corpus: the sha256 will say so
        file.flush()
        os.fsync(file.fileno())


def _received(name: str, url: str) -> Iterator[Any]:
    """The size that the server announces, or None, and then the blocks that come."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            yield int(length) if length else None
            while block := response.read(BLOCK // 16):
                yield block
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(
            f"corpus {name!r} could not be downloaded from {url} ({error}); check the connection, or fetch it "
            "elsewhere and name the file with --data.file PATH"
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
            f"what came from {entry['url']} for corpus {name!r} is no .zip with a sound {entry['member']!r} ({error}); "
            "fetch the text elsewhere and name it with --data.file PATH"
        ) from error
