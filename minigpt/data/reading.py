"""Files -> documents, in pieces of about a megabyte, so that memory does not depend on the size of the text."""

from __future__ import annotations

import gzip
import inspect
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minigpt.data.config import READERS, DataConfig
from minigpt.data.decoding import ReadingLog, as_utf8, decode_utf8
from minigpt.durable import sha256_of
from minigpt.errors import ConfigError, DataError, imported
from minigpt.terminal import notice

BLOCK = 1 << 20  # bytes read at a time
COMPRESSED = (".gz", ".zst")
UNREADABLE = (OSError, EOFError, zlib.error)  # exceptions from opening and decompressing a file
_SURROGATES = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """A piece of a document's text; `ends` is true for the last piece of the document (which may be empty)."""

    text: str
    ends: bool


def content_suffix(path: Path) -> str:
    """Suffix of the file format without the compression suffix: a.jsonl.gz -> .jsonl."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def check_readers(files: Iterable[Path]) -> None:
    """Raise MissingExtra if a file needs a package that is not installed, before any file is read."""
    for path in files:
        if path.suffix.lower() == ".zst" and content_suffix(path) != ".tar":
            imported("zstandard", "zstd", f"reading {path}")
            return


class Stream(io.BufferedReader):
    """What a reader reads: the decompressed bytes of one file.

    Attributes:
        path: the file.
        log: records statistics and problems.
        blocks: the bytes in blocks of about a megabyte, for readers that need no file object.
    """

    def __init__(self, path: Path, log: ReadingLog) -> None:
        self.path, self.log, self.blocks = path, log, _blocks(path, log)
        super().__init__(_Raw(self.blocks), BLOCK)


class _Raw(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.left = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        while not self.left:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.left = block
        count = min(len(room), len(self.left))
        room[:count], self.left = self.left[:count], self.left[count:]
        return count


def reader_of(path: Path) -> str:
    """The row of READERS that reads a file: the suffix of its format, else "text"."""
    suffix = content_suffix(path)
    return suffix if suffix in READERS else "text"


def readers_of(files: Iterable[Path], data: DataConfig) -> dict[str, Any]:
    """The plug-ins that read some of these files, each with its version and settings; part of what identifies a corpus.

    The version is the function's attribute `version`, else a hash of its source.
    """
    found = {}
    for name in sorted({reader_of(path) for path in files}):
        row = READERS.rows[name]
        if row.module is not None:
            version = getattr(row.target, "version", None) or sha256_of(inspect.getsource(row.target))[:12]
            found[name] = {"module": row.module, "version": version, "settings": data.own(name)}
    return found


def read_documents(path: Path, data: DataConfig, log: ReadingLog) -> Iterator[Piece]:
    """The documents of one file, by the reader of its suffix. Line ends stay as they are.

    Args:
        path: the file; .gz and .zst are decompressed on the fly.
        data: settings of the readers, such as the field of .jsonl objects that holds the document.
        log: records statistics and problems.

    Raises:
        DataError: the file cannot be read, or a document is not valid.
        NotText: the file is not text; raised before the first piece.
        MissingExtra: a .zst file without the package zstandard.
    """
    name = reader_of(path)
    reader = READERS.bound(name, data.own(name))
    stream = Stream(path, log)
    try:
        for found in reader(stream, data):
            yield found if isinstance(found, Piece) else _document(found, name, stream)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (DataError, ConfigError):
        raise
    except Exception as error:  # a plug-in's reader can raise anything
        if READERS.rows[name].module is None:
            raise
        where = f"reader '{name}' ({READERS.rows[name].module})"
        raise DataError(f"{path}: {where} failed ({type(error).__name__}: {error})") from error


def _document(text: Any, reader: str, stream: Stream) -> Piece:
    if not isinstance(text, str):
        raise DataError(
            f"{stream.path}: reader '{reader}' yielded {type(text).__name__}; expected the text of a document"
        )
    return Piece(stream.log.read(_without_surrogates(text, stream), str(stream.path)), True)


def _without_surrogates(text: str, stream: Stream) -> str:
    if _SURROGATES.search(text):  # a lone \ud800 is valid JSON but not a character
        text, count = _SURROGATES.subn("\ufffd", text)
        stream.log.replaced(count, str(stream.path))
    return text


def whole_file(stream: Stream, settings: DataConfig) -> Iterator[Piece]:
    """The whole file as one document, in pieces."""
    name = str(stream.path)
    for block in whole_lines(as_utf8(stream.blocks, name, stream.log), BLOCK):
        yield Piece(decode_utf8(block, name, stream.log), False)
    yield Piece("", True)


def json_lines(stream: Stream, settings: DataConfig) -> Iterator[str]:
    """One JSON object per line, with the document in settings.field."""
    number, name = 0, str(stream.path)
    for block in whole_lines(as_utf8(stream.blocks, name, stream.log), limit=None):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            if line.strip():
                yield _json_text(decode_utf8(line, name, stream.log), settings.field, f"{name} line {number}")


def read_text(flag: str, path: str) -> str:
    """Read a small text file given by a flag, decoded like a corpus; "-" is standard input.

    Raises:
        ConfigError: the file cannot be read, or is not text.
    """
    log, name = ReadingLog(), "standard input" if path == "-" else path
    try:
        blocks = _fixed_blocks(standard_input()) if path == "-" else _blocks(Path(path), log)
        text = decode_utf8(b"".join(as_utf8(blocks, name, log)), name, log)
    except UNREADABLE as error:
        raise ConfigError(f"{flag} {path}: cannot be read as text ({error})") from error
    except DataError as error:
        raise ConfigError(f"{flag} {error}") from error
    for line in log.notices():
        notice(f"{flag} {path}: {line}")
    return text


def standard_input() -> BinaryIO:
    """Binary standard input. Raises ConfigError if it is closed."""
    if sys.stdin is None:
        raise ConfigError("standard input (-) is closed; pipe a text into it, or give a file")
    return sys.stdin.buffer


def whole_lines(blocks: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    """Re-cut a stream of bytes so that each piece ends at a line end.

    Lines longer than `limit` are cut between two characters; with None lines are never cut.
    """
    held: list[bytes] = []
    size = 0
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end and limit is not None and size + len(block) >= limit:
            held, size, block = [], 0, b"".join([*held, block])
            end = _character_border(block)
        if end:
            yield b"".join([*held, block[:end]])
            held, size, block = [], 0, block[end:]
        held.append(block)
        size += len(block)
    if size:
        yield b"".join(held)


def _character_border(block: bytes) -> int:
    """Start of the last, incomplete UTF-8 character; the end if the last character is complete."""
    for back in range(1, min(4, len(block)) + 1):
        byte = block[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(block) if back >= width else len(block) - back
    return len(block)


def _blocks(path: Path, log: ReadingLog) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file."""
    with path.open("rb") as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as file:
                yield from _counted(_fixed_blocks(file), raw, log)
        elif suffix == ".zst":
            yield from _counted(_zstandard_blocks(path, raw), raw, log)
        else:
            yield from _counted(_fixed_blocks(raw), raw, log)


def _fixed_blocks(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _zstandard_blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    zstandard = imported("zstandard", "zstd", f"reading {path}")
    frame = None
    while block := raw.read(BLOCK // 16):  # small blocks, because a frame may expand by a factor of a thousand
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                text = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise DataError(f"{path} cannot be read as zstandard: {error}") from error
            if text:
                yield text
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise DataError(f"{path} is truncated: the compressed data is incomplete")


def _counted(blocks: Iterator[bytes], raw: BinaryIO, log: ReadingLog) -> Iterator[bytes]:
    before = 0
    for block in blocks:
        here = raw.tell()
        log.bytes += here - before
        before = here
        yield block


def _json_text(line: str, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); .jsonl holds one object per line") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}, expected an object with the field {field!r}")
    if field not in value:
        known = ", ".join(map(repr, value)) or "none"
        raise DataError(f"{where} has no field {field!r}; its fields are {known}: select one with --data.field")
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__}, expected a string")
    return text
