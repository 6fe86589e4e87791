"""DRY: a penalty on tokens that would continue a repeated sequence (p-e-w, 2024).

If the last n tokens occurred earlier and were followed by v, then choosing v would make the repetition one longer, and
z of v is lowered by multiplier * base^(n - allowed_length), for the greatest such n:

    ... the  cat  sat  on  ...  the  cat      n = 2 for "sat"
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.sampling.processors.processors import Context, Parameter
from minigpt.sampling.processors.scope import span
from minigpt.sampling.settings.rules import (
    AT_LEAST_ONE,
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    SCOPE,
    check,
    check_numbers,
    token_ids,
)

NOTHING = -1  # where a row has no token
LARGEST = 1e30  # a finite penalty that nothing survives


@dataclass(frozen=True)
class DRY:
    """Lower tokens that would extend a repetition of at least `allowed_length` tokens; multiplier 0 is off.

    `breakers` are tokens, or sequences of tokens, across which nothing counts as repeated: line breaks, quotation
    marks, the names of speakers. A single token that breaks is never lowered itself. The penalty ends at 1e30 and is
    never a ban. Greedy rows obey it.
    """

    multiplier: Parameter
    base: Parameter = 1.75
    allowed_length: Parameter = 2
    breakers: Sequence[Any] = ()
    scope: str = "both"
    window: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, multiplier=NOT_NEGATIVE, base=AT_LEAST_ONE, allowed_length=COUNT)
        check(self, scope=SCOPE, window=COUNT_OR_NONE)
        if isinstance(self.breakers, (str, bytes)) or not isinstance(self.breakers, Iterable):
            raise ConfigError(f"sampling: DRY's breakers are {self.breakers!r}; expected token ids, or lists of them")
        object.__setattr__(self, "breakers", tuple(token_ids(self, "breakers", one) for one in self.breakers))

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with those of repetitions lowered."""
        start, stop = (bound.cpu().numpy() for bound in span(context, self.scope, self.window))
        past = backwards(context.ids.cpu().numpy(), start, stop)  # (B, W)
        multiplier, base, allowed = (
            np.array(context.each(parameter), dtype=np.float64)
            for parameter in (self.multiplier, self.base, self.allowed_length)
        )
        # From here on the penalty no longer grows, so neither need the search go further.
        longest = allowed + np.ceil(math.log(LARGEST) / np.log(np.maximum(base, 1 + 1e-6)))
        limit = np.minimum(distance_to_breaker(past, self.breakers), np.where(base > 1, longest, allowed))
        lengths = repeated_lengths(past, limit)  # (B, W - 1)
        rows, places = np.nonzero(lengths >= allowed[:, None])  # few, as a rule
        tokens = past[rows, places]  # what came after each repeated piece
        counts = tokens != NOTHING
        for breaker in self.breakers:
            if len(breaker) == 1:
                counts &= tokens != breaker[0]
        rows, places, tokens = rows[counts], places[counts], tokens[counts]
        with np.errstate(over="ignore"):
            growth = base[rows] ** (lengths[rows, places] - allowed[rows])
            amounts = torch.from_numpy(np.minimum(multiplier[rows] * growth, LARGEST)).to(logits)
        ids = torch.from_numpy(rows * logits.shape[-1] + tokens).to(logits.device)  # among all rows' logits
        flat = logits.flatten()
        return flat.scatter_reduce(0, ids, flat[ids] - amounts, "amin").view_as(logits)


def backwards(ids: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Each row's tokens from position stop - 1 down to start, then `NOTHING`: (B, L), (B,), (B,) -> (B, W), W >= 1."""
    width = max(1, int((stop - start).max()))
    places = stop[:, None] - 1 - np.arange(width)
    tokens = np.take_along_axis(ids, np.clip(places, 0, ids.shape[1] - 1), axis=1)
    return np.where(places >= start[:, None], tokens, NOTHING)


def distance_to_breaker(past: np.ndarray, breakers: Sequence[Sequence[int]]) -> np.ndarray:
    """How many tokens follow the last breaker of each row, all if there is none: (B, W) -> (B,)."""
    distance = (past != NOTHING).sum(1)
    singles = np.isin(past, [breaker[0] for breaker in breakers if len(breaker) == 1])  # often thousands
    distance = np.where(singles.any(1), np.minimum(distance, singles.argmax(1)), distance)
    for breaker in breakers:
        if len(breaker) == 1:
            continue
        room = past.shape[1] - len(breaker) + 1
        if room < 1:
            continue
        found = np.ones((len(past), room), dtype=bool)
        for offset, token in enumerate(reversed(breaker)):
            found &= past[:, offset : offset + room] == token
        distance = np.where(found.any(1), np.minimum(distance, found.argmax(1)), distance)
    return distance


def repeated_lengths(past: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """How many of the last tokens are also those before each place, at most `limit`: (B, W), (B,) -> (B, W - 1).

    Column k - 1 compares the row's end with the same row k tokens earlier; what followed there is past[:, k - 1].
    """
    width = past.shape[1]
    lengths = np.zeros((len(past), width - 1), dtype=np.int64)
    going = np.ones_like(lengths, dtype=bool)
    for n in range(int(min(limit.max(), width - 1))):
        # A place less than n + 1 tokens after the row's beginning has no such token.
        going = going[:, : width - 1 - n] & (past[:, n + 1 :] == past[:, n, None]) & (n < limit)[:, None]
        if not going.any():
            break
        lengths[:, : width - 1 - n] += going
    return lengths
