"""Counter-based random numbers: a function of seed and position, not of earlier draws.

With a stateful generator, a row's random numbers would depend on the other rows of its batch. Here a number is computed
from (seed, absolute token position, sample index, purpose, draw). So a row gets the same numbers in any batch, whether
streamed or not, in one call or continued in several, and going back to an earlier position needs no saved state. The
function is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

MAX_SEED = 2**64 - 1
STRETCH = 64  # positions computed at once, so that most draws are only a table lookup

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a random number is used for. Changing a value changes the result of every seed: append, never renumber."""

    CHOICE = 0
    XTC = 1
    SEARCH = 2
    SEARCH_ROOT = 3


def fresh_seed() -> int:
    """A 32-bit seed from the operating system, short enough to print and retype."""
    return secrets.randbits(32)


def philox(counter: Sequence[np.ndarray], key: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four random 32-bit words for each counter and key.

    Args:
        counter: four uint64 arrays of values below 2**32, broadcast against each other and the key.
        key: two uint64 arrays of values below 2**32.

    Returns:
        Four uint64 arrays of values below 2**32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits: the product fits in 64
        c0, c1, c2, c3 = (right >> _SHIFT) ^ c1 ^ k0, right & _LOW, (left >> _SHIFT) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(
    seeds: np.ndarray, samples: np.ndarray, positions: np.ndarray, purpose: int, draw: int | np.ndarray = 0
) -> np.ndarray:
    """Uniform float64 numbers in [0, 1) with 53 random bits, of the arguments' broadcast shape.

    Args:
        seeds: 64-bit seeds, uint64.
        samples: sample indices, below 2**32.
        positions: absolute position of the token that each number is used for, below 2**32.
        purpose: a `Purpose`.
        draw: distinguishes several numbers for one purpose at one position.
    """
    words = (positions, samples, np.array(purpose), np.array(draw))
    counter = np.broadcast_arrays(*(word.astype(np.uint64) for word in words))
    high, low, _, _ = philox(counter, (seeds & _LOW, seeds >> _SHIFT))
    return ((high >> np.uint64(5)) * 2.0**26 + (low >> np.uint64(6))) * 2.0**-53


class Noise:
    """The random numbers of a batch: each row has its own seed and sample index.

    Args:
        seeds: one per row, 0 .. 2**64 - 1.
        samples: one per row: which of the several samples of its prompt the row is.
    """

    def __init__(self, seeds: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray) -> None:
        self._seeds = np.array(seeds, dtype=np.uint64)
        self._samples = np.array(samples, dtype=np.uint64)
        self._each = np.arange(len(self._seeds))
        self._stretches: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # first positions (B,), numbers

    def uniform(self, positions: np.ndarray, purpose: int, draw: int = 0) -> np.ndarray:
        """One number per row, in [0, 1): (B,) float64; `positions` (B,) are the absolute positions to be decided."""
        first, numbers = self._stretches.get((purpose, draw), (positions, np.empty((len(positions), 0))))
        offset = positions - first
        if offset.min() < 0 or offset.max() >= numbers.shape[1]:
            stretch = positions[:, None] + np.arange(STRETCH)
            numbers = uniforms(self._seeds[:, None], self._samples[:, None], stretch, purpose, draw)
            self._stretches[purpose, draw] = positions.copy(), numbers
            offset = np.zeros_like(positions)
        return numbers[self._each, offset]

    def table(self, positions: np.ndarray, lanes: np.ndarray, purpose: int, draws: np.ndarray) -> np.ndarray:
        """One number per row and draw in [0, 1): (B, N) float64; `lanes` (B,) are the sample indices."""
        return uniforms(self._seeds[:, None], lanes[:, None], positions[:, None], purpose, draws)

    def gather(self, rows: Sequence[int]) -> Noise:
        """The noise of a batch whose row i is the current row rows[i]."""
        return Noise(self._seeds[list(rows)], self._samples[list(rows)])
