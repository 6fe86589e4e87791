"""First and last tokens: forced or forbidden at given lengths. They also apply to greedy rows.

Lengths are counted in each row's own tokens, without padding. The end ids are those of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.sampling.processors.processors import NEVER, Context, Parameter
from minigpt.sampling.settings.rules import COUNT, COUNT_OR_ZERO, POSITIVE, check_numbers, check_vocabulary, token_ids

LARGEST = 1e30  # a finite factor: an infinite logit could not be drawn from


@dataclass(frozen=True)
class MinLength:
    """Forbid the end while prompt and output together have fewer than `length` tokens; 0 is off."""

    length: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, length=COUNT_OR_ZERO)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the end ids in rows that are too short."""
        return _unending(context, logits, context.lengths[:, None] < context.column(self.length))


@dataclass(frozen=True)
class MinNewTokens:
    """Forbid the end while fewer than `count` tokens were written; 0 is off."""

    count: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, count=COUNT_OR_ZERO)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the end ids in rows that wrote too little."""
        return _unending(context, logits, _written(context) < context.column(self.count))


@dataclass(frozen=True)
class ForcedFirst:
    """Make this token the first one written (transformers' forced_bos_token_id, which needs a prompt of one token)."""

    token: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", token_ids(self, "token", [self.token])[0])

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits of 0 for the token and -inf for all others, in rows that begin."""
        return torch.where(_written(context) == 0, _forced(self, logits, (self.token,)), logits)


@dataclass(frozen=True)
class ForcedLast:
    """Make one of the given tokens, or of the end ids, the last one of `max_new_tokens`."""

    max_new_tokens: Parameter
    ids: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, max_new_tokens=COUNT)
        if self.ids is not None:
            object.__setattr__(self, "ids", token_ids(self, "ids", self.ids))

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits of 0 for these tokens and -inf for all others, in rows with one token left.

        Raises:
            ConfigError: there is neither a given token nor an end id.
        """
        ids = _ends(context, logits) if self.ids is None else token_ids(self, "ids", self.ids)
        if not ids:
            raise ConfigError("sampling: ForcedLast has no token to force; give it ids, or the call an eos_token_id")
        last = _written(context) == torch.as_tensor(context.column(self.max_new_tokens), device=logits.device) - 1
        return torch.where(last, _forced(self, logits, ids), logits)


@dataclass(frozen=True)
class ExponentialLengthDecay:
    """Raise the end's logits more and more: z + |z| * (factor^i - 1), i the tokens written beyond `after`.

    A factor below 1 keeps the text going; 1 is off. An impossible end stays impossible.
    """

    after: Parameter
    factor: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, after=COUNT_OR_ZERO, factor=POSITIVE)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with those of the end ids raised in rows that have written more."""
        ends = torch.tensor(_ends(context, logits), dtype=torch.int64, device=logits.device)
        beyond = (_written(context) - context.column(self.after)).clamp(min=0)
        factor = torch.as_tensor(context.column(self.factor), dtype=torch.float64, device=logits.device)
        growth = (factor**beyond - 1).clamp(max=LARGEST).to(logits.dtype)  # (B, 1)
        z = logits[:, ends]
        return logits.index_copy(1, ends, torch.where(z.isfinite(), z + z.abs() * growth, z))


def _written(context: Context) -> Tensor:
    """Tokens after the prompt: (B, 1) int64."""
    return (context.lengths - context.prompt_lengths)[:, None]


def _ends(context: Context, logits: Tensor) -> tuple[int, ...]:
    """The end ids that the model can write."""
    return tuple(end for end in context.end_ids if end < logits.shape[-1])


def _unending(context: Context, logits: Tensor, rows: Tensor) -> Tensor:
    ends = torch.tensor(_ends(context, logits), dtype=torch.int64, device=logits.device)
    return torch.where(rows, logits.index_fill(1, ends, NEVER), logits)


def _forced(processor: Any, logits: Tensor, ids: Sequence[int]) -> Tensor:
    check_vocabulary(processor, max(ids), logits.shape[-1])
    return torch.full_like(logits, NEVER).index_fill_(1, torch.tensor(ids, device=logits.device), 0)
