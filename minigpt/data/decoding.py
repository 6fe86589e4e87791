"""Bytes -> text, with one rule for all inputs: the byte order mark selects the encoding, otherwise UTF-8.

The mark itself is no part of the text. Bytes that stand for no character become U+FFFD and are counted.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from minigpt.errors import DataError

Decode = Callable[[bytes, str, bool], tuple[str, int]]
"""(bytes, what to do with errors, whether they are the last ones) -> text, and how many bytes it took."""

MARKS: dict[bytes, Decode] = {  # UTF-32's before UTF-16's, which it begins with
    codecs.BOM_UTF32_LE: codecs.utf_32_le_decode,
    codecs.BOM_UTF32_BE: codecs.utf_32_be_decode,
    codecs.BOM_UTF8: codecs.utf_8_decode,
    codecs.BOM_UTF16_LE: codecs.utf_16_le_decode,
    codecs.BOM_UTF16_BE: codecs.utf_16_be_decode,
}
SNIFFED = 8192  # bytes that decide whether something is text
RARE = 100  # characters among which one NUL may stand in text


class NotText(DataError):
    """The bytes are something other than text."""


@dataclass
class ReadingLog:
    """What came up while reading: kept apart from the text so that every reader can stay a plain generator."""

    bytes: int = 0
    """Bytes taken from disk so far."""
    invalid: int = 0
    """Replacement characters that stand for bytes that are no character."""
    invalid_in: str = ""
    """The first file that has some."""
    nulls: int = 0
    """NUL characters (U+0000) in the text."""
    nulls_in: str = ""
    """The first file that has some."""
    skipped: list[str] = field(default_factory=list)
    """What was found beside the texts and left out, with the reason where it is not that it is no text."""

    def replaced(self, count: int, name: str) -> None:
        """Note replacement characters in the file of that name."""
        if count:
            self.invalid += count
            self.invalid_in = self.invalid_in or name

    def read(self, text: str, name: str) -> str:
        """Note the NULs of a text from the file of that name; returns the text."""
        if count := text.count("\0"):
            self.nulls += count
            self.nulls_in = self.nulls_in or name
        return text

    def notices(self) -> list[str]:
        """A line for each thing that a person should know of."""
        lines = []
        if self.skipped:
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"left out what does not look like text: {', '.join(self.skipped[:3])}{more}")
        if self.invalid:
            lines.append(
                f"{self.invalid} invalid sequences of bytes became U+FFFD, the first in {self.invalid_in}; "
                "if the file is in another encoding, such as Latin-1, convert it first: iconv -f LATIN1 -t UTF-8"
            )
        if self.nulls:
            lines.append(f"{self.nulls} NUL characters (U+0000) are part of the text, the first in {self.nulls_in}")
        return lines


def as_utf8(blocks: Iterable[bytes], name: str, log: ReadingLog) -> Iterator[bytes]:
    """The bytes of a text in UTF-8, without a mark.

    What has no mark is passed on as it is, for `decode_utf8`; what has one of UTF-16 or UTF-32 is valid from here on.

    Args:
        blocks: the bytes of the whole text, cut anywhere.
        name: of the file, for messages.
        log: is told of what is no character.

    Raises:
        NotText: the beginning holds what text does not.
    """
    blocks, start = iter(blocks), b""
    for block in blocks:
        start += block
        if len(start) >= SNIFFED:
            break
    mark = next((mark for mark in MARKS if start.startswith(mark)), b"")
    decode, start = MARKS.get(mark, codecs.utf_8_decode), start[len(mark) :]
    if not _is_text(start[:SNIFFED], decode):
        hint = "" if mark else "; if it is UTF-16 without its mark, convert it: iconv -f UTF-16LE -t UTF-8"
        raise NotText(f"{name} is not text: there are NUL bytes in its beginning{hint}")
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
    """UTF-8 that is not cut inside a character, as text."""
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
    """Whether a beginning looks like text: no NUL, or few of them in what is otherwise sound."""
    if b"\0" not in start:
        return True
    try:
        text, _ = decode(start, "strict", False)
    except UnicodeDecodeError:
        return "\0" not in decode(start, "replace", False)[0]
    return text.count("\0") * RARE <= len(text)
