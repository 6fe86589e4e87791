"""A read-only sequence of token ids over memory-mapped shards; windows may span shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minigpt.errors import DataError


class TokenStream:
    """The tokens of one split, indexed 0 .. len-1 across its shards. Data is loaded lazily.

    Args:
        paths: shard files in order, each a raw little-endian array.
        counts: number of tokens in each shard.
        dtype: "uint16" or "uint32".
        vocab_size: reading an id at or above it is an error.
        name: name of the stream in error messages ("train", "val").
    """

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], dtype: str, vocab_size: int, name: str = "tokens"
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.counts = [int(count) for count in counts]
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.vocab_size = vocab_size
        self.name = name
        self._begins = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)]).astype(np.int64)
        self._length = int(self._begins[-1])
        self._maps: dict[int, np.ndarray] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._length

    def __reduce__(self):  # a worker process maps the files again
        return TokenStream, (self.paths, self.counts, self.dtype.name, self.vocab_size, self.name)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read the windows [start, start + length) of the stream.

        Args:
            starts: (n,) integers, each from 0 to len(self) - length.
            length: tokens per window, at least 1.

        Returns:
            (n, length) int64.

        Raises:
            DataError: an id is not below `vocab_size`; the message gives its position.
            IndexError: a window exceeds the stream.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (length < 1 or starts.min() < 0 or starts.max() + length > self._length):
            raise IndexError(f"windows of {length} tokens reach beyond the {self._length} tokens of {self.name}")
        if not starts.size:
            return np.empty((0, length), dtype=np.int64)
        if len(self.paths) == 1:
            out = self._windows_of(0, length)[starts].astype(np.int64)
        else:
            out = self._read_across(starts, length)
        if out.max() >= self.vocab_size:
            self._refuse(starts, out)
        return out

    def _read_across(self, starts: np.ndarray, length: int) -> np.ndarray:
        out = np.empty((len(starts), length), dtype=np.int64)
        first = np.searchsorted(self._begins, starts, side="right") - 1
        last = np.searchsorted(self._begins, starts + (length - 1), side="right") - 1
        for shard in np.unique(first):
            inside = (first == shard) & (last == shard)
            if inside.any():
                out[inside] = self._windows_of(shard, length)[starts[inside] - self._begins[shard]]
        for row in np.flatnonzero(first != last):
            position, filled = int(starts[row]), 0
            for shard in range(first[row], last[row] + 1):
                offset = position - int(self._begins[shard])
                part = self._map(shard)[offset : offset + length - filled]
                out[row, filled : filled + len(part)] = part
                position, filled = position + len(part), filled + len(part)
        return out

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            try:
                # View as a plain array, because indexing a numpy.memmap costs microseconds more each time.
                self._maps[shard] = np.memmap(self.paths[shard], self.dtype, "r", shape=(self.counts[shard],)).view(
                    np.ndarray
                )
            except (OSError, ValueError) as error:
                raise DataError(f"shard {self.paths[shard]} cannot be read: {error}") from error
        return self._maps[shard]

    def _windows_of(self, shard: int, length: int) -> np.ndarray:
        """All windows of a shard as a view (count - length + 1, length), so that selecting rows is one copy."""
        shard = int(shard)
        if (shard, length) not in self._windows:
            self._windows[shard, length] = np.lib.stride_tricks.sliding_window_view(self._map(shard), length)
        return self._windows[shard, length]

    def _refuse(self, starts: np.ndarray, out: np.ndarray) -> None:
        row, column = np.argwhere(out >= self.vocab_size)[0]
        position = int(starts[row]) + int(column)
        shard = int(np.searchsorted(self._begins, position, side="right")) - 1
        raise DataError(
            f"shard {self.paths[shard]} contains id {out[row, column]} at token {position - self._begins[shard]}, "
            f"but the vocabulary has {self.vocab_size} ids; the shard is damaged or belongs to another tokenizer: "
            f"delete {self.paths[shard].parent} and prepare the corpus again"
        )
