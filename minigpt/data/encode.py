"""Second pass over a corpus: text -> ids -> shards, in groups of bounded size that use all cores."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minigpt.data.survey import Part
from minigpt.errors import DataError
from minigpt.terminal import Progress
from minigpt.tokenizer.base import Tokenizer

PIECE = 128 << 10  # characters per encode call: small enough to use all cores, large enough to amortize the call
GROUP = 4 << 20  # characters per group; two groups are in memory at a time
UNCUT = 2 << 20  # characters without a safe cut after which the text is cut before any space
SHARD_TOKENS = 100_000_000
_SIGHT = 16  # characters that must follow a cut, so that lookahead patterns match as in the whole text


class ShardWriter:
    """Writes the ids of one split to files PREFIX-00000.bin, ... of at most `limit` tokens each.

    Attributes:
        shards: manifest entry of each file: file, tokens, sha256 (complete after `close`).
    """

    def __init__(self, folder: Path, prefix: str, dtype: str, limit: int = SHARD_TOKENS) -> None:
        self.folder, self.prefix, self.limit = folder, prefix, limit
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def write(self, ids: np.ndarray) -> None:
        """Append ids (n,)."""
        while len(ids):
            if self._file is None or self.shards[-1]["tokens"] == self.limit:
                self.close()
                name = f"{self.prefix}-{len(self.shards):05d}.bin"
                self._file, self._digest = (self.folder / name).open("xb"), hashlib.sha256()
                self.shards.append({"file": name, "tokens": 0, "sha256": ""})
            part = ids[: self.limit - self.shards[-1]["tokens"]]
            content = part.astype(self.dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self.shards[-1]["tokens"] += len(part)
            ids = ids[len(part) :]

    def close(self) -> None:
        """Finish the current file and sync it to disk."""
        if self._file is not None:
            self.shards[-1]["sha256"] = self._digest.hexdigest()
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self._file = None


def cut_parts(parts: Iterable[Part], pattern: re.Pattern[str] | None, size: int = PIECE) -> Iterator[Part]:
    """Re-cut text into parts at positions that do not change its tokens.

    Args:
        parts: parts of any length, cut anywhere.
        pattern: zero-width pattern that matches where text may be cut; None if no such position is known.
        size: minimum characters of a part, unless its text ends there.
    """
    text, searched = "", 0
    for part in parts:
        text += part.text
        begin = 0
        while len(text) - begin > size:
            cut = _cut(text, max(begin + size, searched), pattern, part.ends)
            if not cut and len(text) - begin > UNCUT:
                space = text.rfind(" ", begin + 1, begin + UNCUT)
                cut = space if space > 0 else begin + UNCUT
            if not cut:
                break
            yield part._replace(text=text[begin:cut], ends=False, eot=False)
            begin = cut
        text = text[begin:]
        searched = max(0, len(text) - _SIGHT)
        if part.ends:
            yield part._replace(text=text)
            text, searched = "", 0


def _cut(text: str, start: int, pattern: re.Pattern[str] | None, ends: bool) -> int:
    """First permitted cut at or after `start` that is certain with the text read so far, 0 if there is none."""
    match = pattern.search(text, start) if pattern else None
    last = len(text) - (1 if ends else _SIGHT)
    return match.start() if match and match.start() <= last else 0


def groups(parts: Iterable[Part], size: int = GROUP) -> Iterator[list[Part]]:
    """Collect parts until they have `size` characters together."""
    group: list[Part] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part.text) + 1  # + 1 so that many empty parts also fill a group
        if characters >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group


def encode_parts(
    parts: Iterable[Part], tokenizer: Tokenizer, writers: dict[str, ShardWriter], bar: Progress
) -> dict[str, Counter[str]]:
    """Encode text and write its ids.

    An end-of-text token follows every whole document. The tokenizer's beginning-of-text tokens, if any, precede each
    document, and each half of a document that is cut between the splits. If both are the same token, only one is
    written between two documents. Reading and writing continue while a group is encoded.

    Args:
        parts: text of the splits in `writers`.
        tokenizer: tokenizer to encode with.
        writers: writer of each split; they are closed at the end.
        bar: progress bar, counts characters.

    Returns:
        Counts for each split: tokens, bytes (UTF-8), characters, documents (a cut document counts in both splits).
    """
    counts = {split: Counter(tokens=0, bytes=0, characters=0, documents=0) for split in writers}
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype=np.uint32)
    front = np.array(tokenizer.prefix_ids, dtype=np.uint32)
    begins = dict.fromkeys(writers, True)  # whether the next part of the split starts a document
    done = 0

    def write(group: list[Part], encoded: Future[list[np.ndarray]]) -> None:
        nonlocal done
        ids: dict[str, list[np.ndarray]] = {split: [] for split in writers}
        for part, part_ids in zip(group, encoded.result(), strict=True):
            if begins[part.split]:
                ids[part.split].append(front)
            ids[part.split] += (part_ids, end) if part.eot else (part_ids,)
            begins[part.split] = part.ends and not (part.eot and np.array_equal(front, end))
            count = counts[part.split]
            count["bytes"] += len(part.text.encode("utf-8"))
            count["characters"] += len(part.text)
            count["documents"] += part.ends
            done += len(part.text)
        for split, arrays in ids.items():
            if arrays:
                joined = np.concatenate(arrays)
                if len(joined) and joined.max() >= tokenizer.vocab_size:
                    raise DataError(
                        f"the {tokenizer.kind} tokenizer produced token id {joined.max()}, but its vocabulary has "
                        f"{tokenizer.vocab_size} ids; the tokenizer is damaged, use another one"
                    )
                counts[split]["tokens"] += len(joined)
                writers[split].write(joined)
        bar.update(done)

    try:
        with ThreadPoolExecutor(1) as pool:
            waiting: list[tuple[list[Part], Future[list[np.ndarray]]]] = []
            for group in groups(cut_parts(parts, tokenizer.cut)):
                waiting.append((group, pool.submit(tokenizer.encode_batch, [part.text for part in group])))
                if len(waiting) == 2:
                    write(*waiting.pop(0))
            for group, encoded in waiting:
                write(group, encoded)
    finally:
        for writer in writers.values():
            writer.close()
    return counts
