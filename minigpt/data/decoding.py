"""Bytes -> text, with one rule for all inputs: the byte order mark selects the encoding, otherwise UTF-8.

The BOM is not part of the text. Invalid bytes become U+FFFD and are counted.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from minigpt.errors import DataError

Decode = Callable[[bytes, str, bool], tuple[str, int]]
"""(bytes, error handler, whether these are the last bytes) -> text and number of bytes consumed."""

MARKS: dict[bytes, Decode] = {  # UTF-32 before UTF-16, because the UTF-32-LE mark starts with the UTF-16-LE mark
    codecs.BOM_UTF32_LE: codecs.utf_32_le_decode,
    codecs.BOM_UTF32_BE: codecs.utf_32_be_decode,
    codecs.BOM_UTF8: codecs.utf_8_decode,
    codecs.BOM_UTF16_LE: codecs.utf_16_le_decode,
    codecs.BOM_UTF16_BE: codecs.utf_16_be_decode,
}
SNIFFED = 8192  # bytes at the start that decide whether a file is text
RARE = 100  # text may have at most one NUL per this many characters


class NotText(DataError):
    """The bytes are not text."""


@dataclass
class ReadingLog:
    """Statistics and problems of reading; separate from the text, so that readers can be plain generators."""

    bytes: int = 0
    """Bytes read from disk so far."""
    invalid: int = 0
    """Number of replacement characters inserted for invalid bytes."""
    invalid_in: str = ""
    """First file with invalid bytes."""
    nulls: int = 0
    """Number of NUL characters (U+0000) in the text."""
    nulls_in: str = ""
    """First file with NUL characters."""
    skipped: list[str] = field(default_factory=list)
    """Skipped paths; with the reason, unless it is that the file is not text."""

    def replaced(self, count: int, name: str) -> None:
        """Record replacement characters in the file `name`."""
        if count:
            self.invalid += count
            self.invalid_in = self.invalid_in or name

    def read(self, text: str, name: str) -> str:
        """Record the NULs of a text from the file `name`; return the text."""
        if count := text.count("\0"):
            self.nulls += count
            self.nulls_in = self.nulls_in or name
        return text

    def notices(self) -> list[str]:
        """One line for each kind of problem."""
        lines = []
        if self.skipped:
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"skipped, not text: {', '.join(self.skipped[:3])}{more}")
        if self.invalid:
            lines.append(
                f"{self.invalid} invalid byte sequences were replaced by U+FFFD, the first in {self.invalid_in}; "
                "if the file has another encoding, such as Latin-1, convert it first: iconv -f LATIN1 -t UTF-8"
            )
        if self.nulls:
            lines.append(f"the text contains {self.nulls} NUL characters (U+0000), the first in {self.nulls_in}")
        return lines


def as_utf8(blocks: Iterable[bytes], name: str, log: ReadingLog) -> Iterator[bytes]:
    """Convert the bytes of a text to UTF-8 without a BOM.

    Text without a BOM passes through unchanged, for `decode_utf8`. Text with a UTF-16 or UTF-32 BOM is converted.

    Args:
        blocks: bytes of the whole text, cut anywhere.
        name: name of the file, for messages.
        log: records invalid bytes.

    Raises:
        NotText: the start of the file does not look like text.
    """
    blocks, start = iter(blocks), b""
    for block in blocks:
        start += block
        if len(start) >= SNIFFED:
            break
    mark = next((mark for mark in MARKS if start.startswith(mark)), b"")
    decode, start = MARKS.get(mark, codecs.utf_8_decode), start[len(mark) :]
    if not _is_text(start[:SNIFFED], decode):
        hint = "" if mark else "; if it is UTF-16 without a byte order mark, convert it: iconv -f UTF-16LE -t UTF-8"
        raise NotText(f"{name} is not text: it starts with NUL bytes{hint}")
    blocks = chain([start] if start else [], blocks)
    if decode is codecs.utf_8_decode:
        yield from blocks
        return
    held = b""
    for block, final in chain(((block, False) for block in blocks), [(b"", True)]):
        held += block
        text, taken = _decoded(decode, held, final, name, log)
        held = held[taken:]
        if text:
            yield text.encode("utf-8")


def decode_utf8(content: bytes, name: str, log: ReadingLog) -> str:
    """Decode UTF-8 bytes that are not cut inside a character."""
    return log.read(_decoded(codecs.utf_8_decode, content, True, name, log)[0], name)


def _decoded(decode: Decode, content: bytes, final: bool, name: str, log: ReadingLog) -> tuple[str, int]:
    try:
        return decode(content, "strict", final)
    except UnicodeDecodeError:
        text, taken = decode(content, "replace", final)
        without, _ = decode(content, "ignore", final)
        log.replaced(text.count("\ufffd") - without.count("\ufffd"), name)
        return text, taken


def _is_text(start: bytes, decode: Decode) -> bool:
    """Whether the start of a file looks like text: no NULs, or few of them in valid characters."""
    if b"\0" not in start:
        return True
    try:
        text, _ = decode(start, "strict", False)
    except UnicodeDecodeError:
        return "\0" not in decode(start, "replace", False)[0]
    return text.count("\0") * RARE <= len(text)
