"""First pass over a corpus: which documents are kept, their lengths, and where validation begins."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minigpt.data.clean import clean
from minigpt.data.config import CleanConfig
from minigpt.data.corpus import Source
from minigpt.data.decoding import ReadingLog
from minigpt.data.reading import Piece
from minigpt.errors import DataError
from minigpt.terminal import progress

_PARTS = 10**9  # denominator of val_fraction as a fraction of integers, to count held-out documents exactly


@dataclass(frozen=True)
class Split:
    """The division of documents into training and validation.

    Whole documents are held out, evenly spaced: with 0.1, the first of every ten. With too few documents, each document
    is cut near its end instead: with 0.1, its first `int(characters * 0.9)` characters are for training. For a single
    document this is nanoGPT's split.
    """

    documents: int
    val_fraction: float

    @property
    def rule(self) -> str:
        """Name of the rule that applies: "all train", "tail of each document" or "whole documents"."""
        if not self.val_fraction:
            return "all train"
        enough = self.documents * self.val_fraction >= 1 and self._held_out(self.documents) < self.documents
        return "whole documents" if enough else "tail of each document"

    def train_length(self, index: int, length: int) -> int:
        """Number of characters at the start of a document that are for training.

        Args:
            index: index of the document among those kept.
            length: number of characters of the document.
        """
        if self.rule == "tail of each document":
            return int(length * (1 - self.val_fraction))
        return 0 if self._held_out(index + 1) > self._held_out(index) else length

    def _held_out(self, documents: int) -> int:
        """Number of held-out documents among the first `documents`."""
        return -(-documents * round(self.val_fraction * _PARTS) // _PARTS)


class Part(NamedTuple):
    """A piece of text for one split."""

    split: str
    text: str
    ends: bool
    """The next part starts another document, or the other split's share of this one."""
    eot: bool
    """A whole document ends here, so end-of-text follows. False for documents that are cut between the splits."""


@dataclass
class SurveyedText:
    """What the first pass found, and the way to the text again. It holds nine bytes per document, not the documents."""

    source: Source
    clean: CleanConfig
    kept: bytearray = field(default_factory=bytearray)
    """1 for each kept document, 0 for each dropped one."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Characters of each kept document, after cleaning."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped documents by reason: empty, short, duplicate."""
    sha256: str = ""
    """Sha256 (hex) of the source text before cleaning, with a zero byte between documents."""
    log: ReadingLog = field(default_factory=ReadingLog)

    def parts(self, split: Split) -> Iterator[Part]:
        """Read the kept text again, divided into the splits "train" and "val".

        Raises:
            DataError: the text changed since the first pass (raised at its end).
        """
        number = kept = position = 0
        digest = hashlib.sha256()
        for text, ends in clean(_hashed(self.source.documents(ReadingLog()), digest), self.clean):
            if number == len(self.kept):
                break
            if self.kept[number]:
                length = self.lengths[kept]
                train = split.train_length(kept, length)
                head, tail = text[: max(train - position, 0)], text[max(train - position, 0) :]
                position += len(text)
                whole = train in (0, length)
                if head:
                    yield Part("train", head, position >= train, whole and position >= train)
                if tail:
                    yield Part("val", tail, position >= length, whole and position >= length)
            if ends:
                kept, number, position = kept + self.kept[number], number + 1, 0
        if digest.hexdigest() != self.sha256:
            raise DataError(f"corpus {self.source.name!r} changed while it was being prepared; prepare it again")


def survey(source: Source, config: CleanConfig, show: bool = True) -> SurveyedText:
    """Make the first pass over a corpus.

    Args:
        source: source of the documents.
        config: cleaning and filtering of the documents.
        show: whether to show progress.

    Raises:
        DataError: no document is kept.
    """
    found = SurveyedText(source, config)
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    length, content = 0, hashlib.blake2b(digest_size=16)
    with progress(f"reading {source.name}", source.bytes or None, "bytes", show=show) as bar:
        for text, ends in clean(_hashed(source.documents(found.log), digest), config):
            length += len(text)
            if config.dedupe:
                content.update(text.encode("utf-8"))
            if ends:
                reason = _why_dropped(length, content.digest(), seen, config)
                found.kept.append(not reason)
                if reason:
                    found.dropped[reason] += 1
                else:
                    found.lengths.append(length)
                length, content = 0, hashlib.blake2b(digest_size=16)
            bar.update(found.log.bytes)
    found.sha256 = digest.hexdigest()
    if not found.lengths:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items()) or "no documents"
        reasons = "; ".join([reasons, *found.log.notices()])
        raise DataError(
            f"corpus {source.name!r} has no text left ({reasons}); use another --data.source, or less cleaning"
        )
    return found


def _hashed(pieces: Iterable[Piece], digest: Any) -> Iterator[Piece]:
    begun = False
    for piece in pieces:
        if begun:
            digest.update(b"\0")
        begun = piece.ends
        digest.update(piece.text.encode())
        yield piece


def _why_dropped(length: int, content: bytes, seen: set[bytes], config: CleanConfig) -> str:
    if length == 0:
        return "empty"
    if length < config.min_length:
        return "short"
    if config.dedupe:
        if content in seen:
            return "duplicate"
        seen.add(content)
    return ""
