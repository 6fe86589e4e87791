"""Step number -> batch. Batch s depends only on (seed, s, batch size), so no data order has to be saved.

Each epoch cuts the stream into windows of block_size tokens, starting at a random offset, and visits each window once
in random order. The order is a keyed permutation that is computed on the fly: a Feistel network over the next power of
two above the number of windows, applied again to results outside the range ("cycle walking").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch

from minigpt.data.stream import TokenStream
from minigpt.errors import ConfigError, DataError

# Rounds of the Feistel network: an even number, so that its halves end in their original places. Four are enough for
# wide halves, but a corpus of five windows has halves of two bits and one bit, which need about fifteen to mix evenly.
ROUNDS = 16
AHEAD = 4096  # samples computed at once, to amortize numpy's cost per call over many steps
_OFFSET = np.uint64(1 << 63)  # separates the offset of an epoch from its permutation keys
IGNORED = -100  # target of padding; the ignore_index of torch.nn.functional.cross_entropy


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit words bijectively (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """One 64-bit key per epoch: (n,) uint64."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = _mix(np.array([seed % (1 << 64)], dtype=np.uint64) + golden)
    return _mix(start + (epochs.astype(np.uint64) + np.uint64(1)) * golden)


def permute(x: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply keyed permutations of 0 .. size-1.

    Args:
        x: (n,) integers below `size`.
        size: number of elements of the permutation.
        keys: (n,) uint64; the key of each element selects its permutation.

    Returns:
        (n,) int64.
    """
    bits = max(2, (size - 1).bit_length())
    right_bits = bits // 2
    left_bits = bits - right_bits
    out = x.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        out[walking] = _feistel(out[walking], left_bits, right_bits, keys[walking])
        walking = walking[out[walking] >= size]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, left_bits: int, right_bits: int, keys: np.ndarray) -> np.ndarray:
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    for number in range(ROUNDS):
        # The halves swap places, so with an odd number of bits their widths swap too.
        word = _mix(keys + np.uint64(number * 0xD1342543DE82EF95 % (1 << 64)) + right)
        left, right = right, left ^ (word >> np.uint64(64 - left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


class Batches:
    """The training batches of a stream, indexed by step.

    Args:
        stream: training tokens.
        block_size: T, tokens per row.
        batch_size: rows per step, over all processes and micro-batches.
        seed: seed of the order.
        order: "shuffled" (each window once per epoch) or "random" (windows at random positions, with replacement).

    Raises:
        DataError: the stream has fewer than block_size + 1 tokens.
        ConfigError: invalid size or order.

    Attributes:
        windows: rows per epoch.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, batch_size: int, seed: int, order: str = "shuffled"
    ) -> None:
        for name, value in (("block_size", block_size), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        if order not in ("shuffled", "random"):
            raise ConfigError(f"data.order is {order!r}; expected shuffled or random")
        if len(stream) < block_size + 1:
            shorter = f" or a block_size of at most {len(stream) - 1}" if len(stream) > 1 else ""
            raise DataError(
                f"{stream.name} has {len(stream)} tokens, but one row needs block_size + 1 = {block_size} + 1 = "
                f"{block_size + 1}; use a longer text{shorter}"
            )
        self.stream, self.block_size, self.batch_size = stream, block_size, batch_size
        self.seed, self.order = seed, order
        # Every offset must give the same number of windows, so that all epochs have the same length.
        self.windows = max(1, (len(stream) - block_size) // block_size)
        self._offsets = min(block_size, len(stream) - self.windows * block_size)
        self._computed: tuple[int, np.ndarray] = (0, np.empty(0, dtype=np.int64))

    def starts(self, step: int) -> np.ndarray:
        """Start positions of the rows of batch `step`: (batch_size,) int64."""
        if self.order == "random":
            words = np.random.Philox(key=np.array([self.seed % (1 << 64), step], dtype=np.uint64))
            return (words.random_raw(self.batch_size) % (len(self.stream) - self.block_size)).astype(np.int64)
        first = step * self.batch_size
        begin, starts = self._computed
        if not begin <= first <= begin + len(starts) - self.batch_size:
            begin, starts = first, self._shuffled(first, max(AHEAD, self.batch_size))
            self._computed = begin, starts
        return starts[first - begin : first - begin + self.batch_size]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of steps 0, 1, 2, ..., without end: ids and targets (rows, block_size) each."""
        return map(self.read, count())

    def read(self, step: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Read rows of batch `step`: the slice of a process or micro-batch.

        Returns:
            ids and targets, (rows, T) int64 each; targets are the ids shifted by one.
        """
        tokens = torch.from_numpy(self.stream.read(self.starts(step)[rows], self.block_size + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def epoch(self, step: int) -> float:
        """Number of epochs completed before batch `step`."""
        return step * self.batch_size / self.windows

    def _shuffled(self, first: int, count: int) -> np.ndarray:
        samples = np.arange(first, first + count, dtype=np.int64)
        keys = _keys(self.seed, samples // self.windows)
        offsets = (_mix(keys + _OFFSET) % np.uint64(self._offsets)).astype(np.int64)
        return offsets + self.block_size * permute(samples % self.windows, self.windows, keys)


class ValidationWindows:
    """Consecutive windows of block_size tokens over a whole stream; the last one may be shorter.

    Without a limit, every token except the first and those in `given` is a target exactly once. With a limit, a fixed
    subset of evenly spaced windows is used.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, limit_tokens: int | None = None, given: Sequence[int] = ()
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}; expected at least 1")
        if len(stream) < 2:
            raise DataError(
                f"{stream.name} has {len(stream)} tokens, but evaluation needs at least 2; raise --data.val_fraction, "
                "use a longer text, or switch validation off"
            )
        self.stream, self.block_size, self.given = stream, block_size, list(given)
        whole = -(-(len(stream) - 1) // block_size)
        kept = whole if limit_tokens is None else min(whole, max(1, limit_tokens // block_size))
        self._starts = np.arange(kept, dtype=np.int64) * whole // kept * block_size

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def tokens(self) -> int:
        """Total number of targets in all windows."""
        return int(np.minimum(self.block_size, len(self.stream) - 1 - self._starts).sum())

    def read(self, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a slice of the windows.

        Returns:
            ids and targets, (rows, T) int64 each. Past the end of the stream, ids are 0 and targets -100 (ignored).
            Targets in `given` are -100 too.
        """
        starts, block_size = self._starts[rows], self.block_size
        ids = np.zeros((len(starts), block_size), dtype=np.int64)
        targets = np.full((len(starts), block_size), IGNORED, dtype=np.int64)
        whole = starts + block_size < len(self.stream)
        tokens = self.stream.read(starts[whole], block_size + 1)
        ids[whole], targets[whole] = tokens[:, :-1], tokens[:, 1:]
        for row in np.flatnonzero(~whole):
            left = len(self.stream) - int(starts[row])
            tail = self.stream.read(starts[row : row + 1], left)[0]
            ids[row, : left - 1], targets[row, : left - 1] = tail[:-1], tail[1:]
        if self.given:
            targets[np.isin(targets, self.given)] = IGNORED
        return torch.from_numpy(ids), torch.from_numpy(targets)


def validation_windows(
    stream: TokenStream, block_size: int, limit_tokens: int | None = None, given: Sequence[int] = ()
) -> ValidationWindows:
    """Create the windows for evaluating a split.

    Args:
        stream: held-out tokens.
        block_size: T, tokens per window.
        limit_tokens: approximate maximum number of targets (at least one window); None: all.
        given: ids that are not targets, such as the beginning-of-text token of each document.

    Raises:
        DataError: the stream has fewer than two tokens.
    """
    return ValidationWindows(stream, block_size, limit_tokens, given)
