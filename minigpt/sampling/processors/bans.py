"""Bans and biases of given tokens, alone or after given others. They also apply to greedy rows.

Definitions are those of transformers' processors of similar names; each row is seen without its padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.sampling.processors.processors import NEVER, Context, Parameter
from minigpt.sampling.settings.rules import (
    BIAS,
    COUNT_OR_ZERO,
    FUNCTION,
    check,
    check_numbers,
    check_vocabulary,
    token_ids,
)

NOTHING = -1  # where a row has no token
ANYTHING = -2  # where a sequence asks for none


@dataclass(frozen=True)
class NoRepeatNGram:
    """Forbid the token that would complete n tokens in a row that occurred before, in the prompt or after it.

    Paulus, Xiong and Socher, 2017, arXiv:1705.04304. n = 1 forbids every token seen; 0 is off.
    """

    n: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, n=COUNT_OR_ZERO)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for tokens that complete an n-gram."""
        return logits.scatter_add(1, context.ids, _completing(context, self.n, context.lengths, logits))


@dataclass(frozen=True)
class PromptNoRepeatNGram:
    """Forbid the token that would complete n tokens in a row of the prompt; 0 is off.

    transformers calls it encoder_no_repeat_ngram_size.
    """

    n: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, n=COUNT_OR_ZERO)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for tokens that complete an n-gram of the prompt."""
        return logits.scatter_add(1, context.ids, _completing(context, self.n, context.prompt_lengths, logits))


def _completing(context: Context, n: Parameter, stop: Tensor, logits: Tensor) -> Tensor:
    """-inf where, before position `stop` (B,), the n - 1 tokens ahead are the row's last n - 1; else 0: (B, L)."""
    sizes = torch.as_tensor(context.column(n, torch.int64), device=logits.device)  # (B, 1), or one for all
    place = torch.arange(context.ids.shape[1], device=logits.device)
    found = (place >= sizes - 1) & (place < stop[:, None]) & (sizes > 0)
    for back in range(1, min(int(sizes.max()), context.ids.shape[1] + 1)):
        token = context.ids.gather(1, (context.lengths - back).clamp(min=0)[:, None])
        agrees = context.ids[:, :-back] == token
        found[:, back:] &= agrees | (back >= sizes) if isinstance(n, tuple) else agrees
    return torch.zeros_like(found, dtype=logits.dtype).masked_fill_(found, NEVER)


@dataclass(frozen=True)
class SequenceBias:
    """Add a bias to a token where it would complete a sequence: {(5,): -2.0, (7, 8): 4.0}.

    A sequence of one token is always about to be completed. Biases of several sequences that end alike add up;
    minus infinity forbids.
    """

    bias: Mapping[tuple[int, ...], float]
    _tables: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _mapping(self, self.bias)
        # Short ones first: the order in which biases of one token are added.
        pairs = sorted(((token_ids(self, "bias", ids), value) for ids, value in self.bias.items()), key=_length)
        object.__setattr__(self, "bias", dict(pairs))
        object.__setattr__(self, "_tables", _tables(list(self.bias), list(self.bias.values())))

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with the biases of the sequences that each row is about to complete."""
        check_vocabulary(self, _largest(self._tables), logits.shape[-1])
        prefixes, lasts, columns, biases = (table.to(logits.device) for table in self._tables)
        matched = _ends_with(context, prefixes)  # (B, K)
        added = torch.where(matched, biases.to(logits.dtype), 0)
        total = logits.new_zeros(len(logits), len(columns)).index_add_(1, lasts, added)
        return logits.index_add(1, columns, total)


def _length(pair: tuple[tuple[int, ...], float]) -> int:
    return len(pair[0])


def _tables(sequences: list[tuple[int, ...]], biases: list[float]) -> tuple[Tensor, ...]:
    """Prefixes (K, Q) filled up at the left, the column (K,) of each last token, the tokens (U,) of columns, biases."""
    longest = max(map(len, sequences)) - 1
    prefixes = [[ANYTHING] * (longest + 1 - len(sequence)) + list(sequence[:-1]) for sequence in sequences]
    columns, lasts = torch.tensor([sequence[-1] for sequence in sequences]).unique(return_inverse=True)
    values = torch.tensor(biases, dtype=torch.float64)
    return torch.tensor(prefixes, dtype=torch.int64).reshape(len(sequences), longest), lasts, columns, values


def _largest(tables: tuple[Tensor, ...]) -> int:
    prefixes, _, columns, _ = tables
    return int(torch.cat((prefixes.flatten(), columns)).max())


def _ends_with(context: Context, prefixes: Tensor) -> Tensor:
    """Which rows end with which prefixes: (K, Q) -> (B, K) bool."""
    places = context.lengths[:, None] + torch.arange(-prefixes.shape[1], 0, device=context.ids.device)  # (B, Q)
    tail = torch.where(places >= 0, context.ids.gather(1, places.clamp(min=0)), NOTHING)
    return ((tail[:, None] == prefixes) | (prefixes == ANYTHING)).all(-1)


@dataclass(frozen=True)
class BadWords:
    """Forbid the last token of a sequence where those before it were written: [[5], [7, 8]].

    A sequence that is one of the call's end ids alone does not count: a text has to end.
    """

    words: Sequence[Sequence[int]]
    _tables: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.words, (str, bytes)) or not self.words:
            raise ConfigError(f"sampling: BadWords' words are {self.words!r}; expected lists of token ids")
        words = tuple(sorted({token_ids(self, "words", word) for word in self.words}))
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "_tables", _tables(list(words), [NEVER] * len(words)))

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for tokens that complete a word."""
        check_vocabulary(self, _largest(self._tables), logits.shape[-1])
        prefixes, lasts, columns, _ = (table.to(logits.device) for table in self._tables)
        ends = torch.isin(columns, torch.tensor(context.end_ids, dtype=torch.int64, device=logits.device))[lasts]
        matched = _ends_with(context, prefixes) & ~(ends & (prefixes == ANYTHING).all(-1))
        total = torch.zeros(matched.shape, dtype=logits.dtype, device=logits.device).masked_fill_(matched, NEVER)
        return logits.index_add(1, columns[lasts], total)


@dataclass(frozen=True)
class LogitBias:
    """Add a bias to single tokens, always: {5: -2.0, 7: 4.0}; minus infinity forbids."""

    bias: Mapping[int, float]
    _columns: Tensor = field(init=False, repr=False, compare=False)
    _biases: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _mapping(self, self.bias)
        pairs = {token_ids(self, "bias", token)[0]: value for token, value in self.bias.items()}
        object.__setattr__(self, "bias", pairs)
        object.__setattr__(self, "_columns", torch.tensor(list(pairs)))
        object.__setattr__(self, "_biases", torch.tensor(list(pairs.values()), dtype=torch.float64))

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with the biases."""
        check_vocabulary(self, int(self._columns.max()), logits.shape[-1])
        shape = len(logits), len(self._columns)
        return logits.scatter_add(
            1, self._columns.to(logits.device).expand(shape), self._biases.to(logits).expand(shape)
        )


@dataclass(frozen=True)
class _OfIds:
    ids: Sequence[int]
    _columns: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", token_ids(self, "ids", self.ids))
        object.__setattr__(self, "_columns", torch.tensor(self.ids))


@dataclass(frozen=True)
class AllowedIds(_OfIds):
    """Forbid all but these tokens."""

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for every other token."""
        return _only(self, logits, self._columns)


@dataclass(frozen=True)
class Suppress(_OfIds):
    """Forbid these tokens."""

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for these tokens."""
        return _without(self, logits, self._columns)


@dataclass(frozen=True)
class BeginSuppress(_OfIds):
    """Forbid these tokens as the first after the prompt."""

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for these tokens in rows that begin."""
        begins = (context.lengths == context.prompt_lengths)[:, None]
        return torch.where(begins, _without(self, logits, self._columns), logits)


@dataclass(frozen=True)
class PrefixAllowed:
    """Forbid all but the tokens that function(prompt number, ids so far) returns (De Cao et al., 2020, 2010.00904).

    The ids are the row's own, prompt and written ones, (n,) int64. Where all returned tokens were impossible before,
    they are made equally likely, so that the constraint holds.
    """

    function: Callable[[int, Tensor], Sequence[int]]

    def __post_init__(self) -> None:
        check(self, function=FUNCTION)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for every other token."""
        rows = []
        for row, (prompt, length) in enumerate(zip(context.rows, context.positions.tolist(), strict=True)):
            ids = torch.tensor(token_ids(self, "answer", self.function(prompt, context.ids[row, :length].clone())))
            only = _only(self, logits[row : row + 1], ids)
            rows.append(only if only.amax() > NEVER else _only(self, torch.zeros_like(only), ids))
        return torch.cat(rows)


def _only(processor: Any, logits: Tensor, columns: Tensor) -> Tensor:
    check_vocabulary(processor, int(columns.max()), logits.shape[-1])
    columns = columns.to(logits.device).expand(len(logits), -1)
    return torch.full_like(logits, NEVER).scatter_(1, columns, logits.gather(1, columns))


def _without(processor: Any, logits: Tensor, columns: Tensor) -> Tensor:
    check_vocabulary(processor, int(columns.max()), logits.shape[-1])
    return logits.index_fill(1, columns.to(logits.device), NEVER)


def _mapping(processor: Any, bias: Any) -> None:
    values = list(bias.values()) if isinstance(bias, Mapping) else []
    if not values or not all(map(BIAS.accepts, values)):
        raise ConfigError(
            f"sampling: {type(processor).__name__}'s bias is {bias!r}; expected each token's {BIAS.expected}"
        )
