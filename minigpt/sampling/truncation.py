"""Filters: each keeps a part of the distribution and forbids the rest.

`removed` is a filter's definition: from (B, V) logits to the (B, V) tokens that go. Every filter acts on each row
alone, leaves at least one token, and sees probabilities renormalised over what earlier filters left. A parameter is a
number, or one for each prompt of the call; `keep` is how many tokens survive at least. p stands for softmax(z).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.sampling.noise import Purpose
from minigpt.sampling.processors import NEVER, Context, Parameter
from minigpt.sampling.rules import (
    BELOW_ONE,
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE_FRACTION,
    check,
    check_numbers,
    check_vocabulary,
    token_ids,
)


class Filter(ABC):
    """A processor that forbids the tokens of `removed`."""

    shaping: ClassVar[bool] = True

    @abstractmethod
    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """Which tokens go: (B, V) bool."""

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens that go."""
        return logits.masked_fill(self.removed(context, logits), NEVER)


def likeliest(logits: Tensor, k: Tensor | int) -> Tensor:
    """Exactly the k likeliest tokens, of equals the first: (B, V) and a number or (B, 1), 1 or more -> (B, V) bool."""
    k = (
        torch.as_tensor(k, dtype=torch.float64, device=logits.device)
        .clamp(max=logits.shape[-1])
        .long()
        .expand(len(logits), 1)
    )
    border = logits.topk(int(k.max()), dim=-1).values.gather(-1, k - 1)  # (B, 1)
    above, level = logits > border, logits == border
    return above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def at_least(logits: Tensor, k: int) -> Tensor:
    """The k likeliest tokens and whatever ties with the k-th: (B, V) bool."""
    return logits >= logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]


@dataclass(frozen=True)
class ExactTopK(Filter):
    """Keep exactly the k likeliest tokens; of equally likely ones the first (`TopK` keeps what ties with the k-th)."""

    k: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, k=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """All but k tokens."""
        return ~likeliest(logits, context.column(self.k))


@dataclass(frozen=True)
class MinP(Filter):
    """Remove p < min_p * max p (Nguyen et al., 2024, arXiv:2407.01082); 0 is off."""

    min_p: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, min_p=FRACTION)
        check(self, keep=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens too far below the likeliest one."""
        p = logits.softmax(-1)
        far = p < context.column(self.min_p, p.dtype) * p.amax(-1, keepdim=True)
        return far & ~likeliest(logits, self.keep) if self.keep > 1 else far


@dataclass(frozen=True)
class TopA(Filter):
    """Remove p < a * (max p)^2, after BlinkDL's RWKV; 0 is off."""

    a: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, a=FRACTION)
        check(self, keep=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens too far below the square of the likeliest one."""
        p = logits.softmax(-1)
        far = p < context.column(self.a, p.dtype) * p.amax(-1, keepdim=True) ** 2
        return far & ~likeliest(logits, self.keep) if self.keep > 1 else far


@dataclass(frozen=True)
class Epsilon(Filter):
    """Remove p < epsilon (Hewitt, Manning and Liang, 2022, arXiv:2210.15191); 0 is off."""

    epsilon: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, epsilon=BELOW_ONE)
        check(self, keep=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens below a fixed probability."""
        p = logits.softmax(-1)
        return (p < context.column(self.epsilon, p.dtype)) & ~at_least(logits, self.keep)


@dataclass(frozen=True)
class Eta(Filter):
    """Remove p < min(epsilon, sqrt(epsilon) * exp(-H)), H the entropy in nats (same source as `Epsilon`); 0 is off."""

    epsilon: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, epsilon=BELOW_ONE)
        check(self, keep=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens below a probability that falls as the distribution flattens."""
        p = logits.softmax(-1)
        epsilon = torch.as_tensor(context.column(self.epsilon), dtype=p.dtype, device=p.device)
        entropy = torch.special.entr(p).sum(-1, keepdim=True)
        return (p < torch.minimum(epsilon, epsilon.sqrt() * (-entropy).exp())) & ~at_least(logits, self.keep)


@dataclass(frozen=True)
class Typical(Filter):
    """Keep the tokens whose surprise is closest to the entropy until their mass reaches `mass`, and what ties.

    Meister, Pimentel, Wiher and Cotterell, 2022, arXiv:2202.00666; 1 is off.
    """

    mass: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, mass=POSITIVE_FRACTION)
        check(self, keep=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens of too much or too little surprise."""
        log_p = logits.log_softmax(-1)
        entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)  # 0 * -inf, of an impossible token, counts nothing
        distance, order = (-log_p - entropy).abs().sort(dim=-1, stable=True)
        mass = torch.as_tensor(context.column(self.mass), dtype=logits.dtype, device=logits.device)
        reached = logits.gather(-1, order).softmax(-1).cumsum(-1)
        last = (reached < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        remove = (distance > distance.gather(-1, last)) & (mass < 1)
        remove[:, : self.keep] = False
        return remove.scatter(-1, order, remove)


@dataclass(frozen=True)
class TailFree(Filter):
    """Cut where the curve of falling probabilities has spent the share z of its bends (Phénix and Egan, 2019).

    The bends are the absolute second differences of p in falling order. Token i + 1 (counted from 0) goes once the
    bends up to number i make up more than z of all. A row without bends (all equally likely) keeps all; z = 1 is off.
    """

    z: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, z=FRACTION)
        check(self, keep=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tail."""
        falling, order = logits.sort(dim=-1, descending=True, stable=True)
        z = torch.as_tensor(context.column(self.z), dtype=torch.float64, device=logits.device)
        bends = falling.double().softmax(-1).diff(n=2).abs() if logits.shape[-1] > 2 else falling[:, :0]  # (B, V - 2)
        spent = (bends.cumsum(-1) > z * bends.sum(-1, keepdim=True)) & (z < 1)
        remove = torch.zeros_like(logits, dtype=torch.bool)
        remove[:, 1:-1] = spent
        remove[:, -1:] = spent[:, -1:] if spent.shape[-1] else False
        remove[:, : self.keep] = False
        return remove.scatter(-1, order, remove)


@dataclass(frozen=True)
class TopNSigma(Filter):
    """Remove z < max z - n * sigma (Tang et al., 2024, arXiv:2411.07641); 0 is off.

    Sigma is the population's standard deviation of the finite logits, so that a temperature changes nothing here.
    """

    n: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, n=NOT_NEGATIVE)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens too many deviations below the likeliest one."""
        n = torch.as_tensor(context.column(self.n), dtype=torch.float64, device=logits.device)
        finite = logits > NEVER
        z = logits.double().masked_fill(~finite, 0)
        count = finite.sum(-1, keepdim=True)
        spread = (z - z.sum(-1, keepdim=True) / count).masked_fill(~finite, 0)
        sigma = (spread.square().sum(-1, keepdim=True) / count).sqrt()
        return (logits.double() < logits.amax(-1, keepdim=True) - n * sigma) & (n > 0)


@dataclass(frozen=True)
class TopH(Filter):
    """Keep the likeliest tokens while the sum of their -p ln p stays within h of the whole (arXiv:2509.02510).

    As in transformers, the whole is the distribution of the `top_n` likeliest tokens, beyond which nothing is kept;
    the likeliest one always is.
    """

    h: Parameter
    top_n: int = 100

    def __post_init__(self) -> None:
        check_numbers(self, h=POSITIVE_FRACTION)
        check(self, top_n=COUNT)

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """All after the share h of the entropy."""
        falling, order = logits.sort(dim=-1, descending=True, stable=True)
        h = torch.as_tensor(context.column(self.h), dtype=torch.float64, device=logits.device)
        terms = torch.special.entr(falling[:, : self.top_n].double().softmax(-1))
        beyond = (terms.cumsum(-1) > h * terms.sum(-1, keepdim=True)) & (h < 1)
        remove = torch.ones_like(logits, dtype=torch.bool)
        remove[:, : self.top_n] = beyond | (terms == 0)  # too unlikely to have a probability
        remove[:, 0] = False
        return remove.scatter(-1, order, remove)


@dataclass(frozen=True)
class PLess(Filter):
    """Remove p < the sum of all p^2, the chance that two draws agree (arXiv:2509.23234). No parameter.

    Probabilities (.1, .15, .2, .25, .3) have the sum .225 and keep .25 and .3.
    """

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The tokens less likely than an agreement."""
        p = logits.double().softmax(-1)
        # The sum is at most max p; where all are equal it is that, but for rounding.
        return p < torch.minimum(p.square().sum(-1, keepdim=True), p.amax(-1, keepdim=True))


@dataclass(frozen=True)
class XTC(Filter):
    """Exclude top choices: with the given probability, remove all tokens with p >= threshold but the least likely one.

    Of p-e-w, 2024. A row with fewer than two such tokens, as always above a threshold of .5, stays as it is; so does
    one in which a token of `spare` (an end, a line break) would go, or fewer than `keep` tokens would be left.
    """

    probability: Parameter
    threshold: Parameter
    spare: tuple[int, ...] = ()
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, probability=FRACTION, threshold=FRACTION)
        check(self, keep=COUNT)
        object.__setattr__(self, "spare", token_ids(self, "spare", self.spare) if self.spare else ())

    def removed(self, context: Context, logits: Tensor) -> Tensor:
        """The top choices but the last, in the rows whose coin says so."""
        p = logits.softmax(-1)
        # A token that is impossible is no choice, even at threshold 0.
        top = (p >= context.column(self.threshold, p.dtype)) & (logits > NEVER)
        least = p.masked_fill(~top, 2).argmin(-1, keepdim=True)
        go = top.scatter(-1, least, False)
        heads = context.uniform(Purpose.XTC).unsqueeze(1) < context.column(self.probability)
        left = (logits > NEVER).sum(-1, keepdim=True) - go.sum(-1, keepdim=True)
        check_vocabulary(self, max(self.spare, default=0), p.shape[-1])
        spared = go[:, list(self.spare)].any(-1, keepdim=True)
        return go & heads & (left >= self.keep) & ~spared
