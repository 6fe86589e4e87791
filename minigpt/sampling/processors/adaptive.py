"""Stateful processors: each steers a row towards a target, based on the tokens chosen so far.

Put them last: what they learn from is the probability a token had when it was chosen. A row's state holds its own
parameters too, so that it needs no look at the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.sampling.processors.processors import NEVER, Context, Parameter
from minigpt.sampling.processors.ranking import cut, keep_likeliest, only_possible
from minigpt.sampling.settings.rules import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    check,
    check_numbers,
    is_number,
)

_DECAY = Rule(lambda v: is_number(v) and 0 <= v <= 0.99, "a number from 0 to 0.99")


class Surprise(NamedTuple):
    """A row's mirostat: (B,) float64 each, in bits."""

    mu: Tensor
    """Most surprise that a token may have now."""
    tau: Tensor
    eta: Tensor


class _Mirostat:
    tau: Parameter
    eta: Parameter
    shaping: ClassVar[bool] = True

    def start(self, context: Context) -> Surprise:
        """Twice the target."""
        tau, eta = _column(context, self.tau), _column(context, self.eta)
        return Surprise(2 * tau, tau, eta)

    def accept(self, state: Surprise, tokens: Tensor, raw: Tensor, processed: Tensor) -> Surprise:
        """Move mu to mu - eta * (S - tau): S is the token's surprise under the distribution it was drawn from."""
        chosen = processed.gather(1, tokens[:, None]).squeeze(1).double()
        moved = state.mu - state.eta * (-chosen.clamp(min=1e-300).log2() - state.tau)
        return state._replace(mu=torch.where(chosen > 0, moved, state.mu))  # a token that was forced teaches nothing


@dataclass(frozen=True)
class Mirostat1(_Mirostat):
    """Keep the k likeliest tokens, k such that a Zipf law has the surprise mu (Basu et al., 2020, arXiv:2007.14966).

    The law's exponent s is fitted to the `m` likeliest tokens: s = sum t b / sum t^2, where t = ln((i + 2) / (i + 1))
    and b = ln(p_i / p_(i+1)) for i = 0, 1, ... With e = s - 1, k = (e * 2^mu / (1 - V^-e))^(1/s), rounded down, at
    least 1. Then mu moves against the surprise's distance from `tau` (bits), by `eta` of it.
    """

    tau: Parameter = 5.0
    eta: Parameter = 0.1
    m: int = 100

    def __post_init__(self) -> None:
        check_numbers(self, tau=POSITIVE, eta=NOT_NEGATIVE)
        check(self, m=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: Surprise) -> Tensor:
        """Logits with -inf for all but k tokens."""
        vocab_size = logits.shape[-1]
        z = logits.topk(min(self.m, vocab_size), dim=-1).values.double()
        t = torch.log1p(1 / torch.arange(1, z.shape[1], dtype=torch.float64, device=z.device))
        known = z[:, 1:] > NEVER  # no ratio to an impossible token
        b = torch.where(known, z[:, :-1] - z[:, 1:], 0)
        s = ((t * b).sum(-1) / (t.square() * known).sum(-1)).clamp(min=1e-6)
        e = s - 1
        log_size = np.log(vocab_size)
        # e / (1 - V^-e) is 1 / ln V in the limit of e = 0.
        scale = torch.where(e.abs() < 1e-9, 1 / max(log_size, 1e-9), e / -torch.expm1(-e * log_size))
        log_k = (scale.log() + state.mu * np.log(2)) / s
        k = log_k.nan_to_num(0).clamp(0, log_size + 1).exp().floor()
        return keep_likeliest(logits, k[:, None])


@dataclass(frozen=True)
class Mirostat2(_Mirostat):
    """Forbid the tokens of more than mu bits of surprise, but not the likeliest (same source as `Mirostat1`).

    Then mu moves against the distance of the chosen token's surprise from `tau` (bits), by `eta` of it.
    """

    tau: Parameter = 5.0
    eta: Parameter = 0.1

    def __post_init__(self) -> None:
        check_numbers(self, tau=POSITIVE, eta=NOT_NEGATIVE)

    def __call__(self, context: Context, logits: Tensor, state: Surprise) -> Tensor:
        """Logits with -inf for the tokens that are too surprising."""
        top = logits.softmax(-1).amax(-1, keepdim=True).double()
        border = -(top.log() + state.mu[:, None] * np.log(2))  # how far above the likeliest token's logit
        left = cut(logits, logits, logits.amax(-1, keepdim=True) + border.to(logits.dtype))
        return torch.maximum(left, keep_likeliest(logits, 1)) if (border > 0).any() else left


class Average(NamedTuple):
    """A row's adaptive p: (B,) float64 each."""

    total: Tensor
    """The probabilities of the chosen tokens, each weighted by decay^(its age), summed."""
    weight: Tensor
    """The sum of those weights."""
    target: Tensor
    decay: Tensor


@dataclass(frozen=True)
class AdaptiveP:
    """Prefer tokens of a middling probability, such that the chosen ones' average comes near `target` (llama.cpp).

    With d = |p - a| / 0.3 a token's logit is 5 - 10 d^2 / (1 + d), whatever it was. The aim a is 2 * target minus the
    exponential average of the chosen tokens' probabilities, within 0 and 1. Averaged are the model's own
    probabilities, before any processor; at the start the average is the target.
    """

    target: Parameter
    decay: Parameter = 0.9
    shaping: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, target=FRACTION, decay=_DECAY)

    def start(self, context: Context) -> Average:
        """As after a long text that met the target."""
        target, decay = _column(context, self.target), _column(context, self.decay)
        return Average(target / (1 - decay), 1 / (1 - decay), target, decay)

    def __call__(self, context: Context, logits: Tensor, state: Average) -> Tensor:
        """The logits made from probabilities; impossible tokens stay so."""
        aim = (2 * state.target - state.total / state.weight).clamp(0, 1)[:, None]
        distance = logits.softmax(-1).sub_(aim.to(logits.dtype)).abs_().div_(0.3)
        made = 5 - 10 * distance.square().div_(distance.add_(1))
        return only_possible(made, logits)

    def accept(self, state: Average, tokens: Tensor, raw: Tensor, processed: Tensor) -> Average:
        """The average with the token's own probability."""
        chosen = raw.gather(1, tokens[:, None]).squeeze(1).double()
        return state._replace(total=chosen + state.decay * state.total, weight=1 + state.decay * state.weight)


def _column(context: Context, parameter: Parameter) -> Tensor:
    return torch.tensor(context.each(parameter), dtype=torch.float64, device=context.ids.device)
