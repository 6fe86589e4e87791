"""Filters with a threshold: tokens with a probability or logit below it are forbidden.

See `truncation` for what holds for every filter. p stands for softmax(z), z for the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.sampling.processors.processors import NEVER, Context, Filter, Parameter
from minigpt.sampling.processors.ranking import above, at_least, count_possible, cut, mean_logit
from minigpt.sampling.settings.rules import BELOW_ONE, COUNT, FRACTION, NOT_NEGATIVE, check, check_numbers


@dataclass(frozen=True)
class MinP(Filter):
    """Remove `p < min_p * max p`.

    Source: Nguyen et al., 2024, arXiv:2407.01082.
    When: a good filter to use alone. Its threshold follows the most likely token, so it works at high temperatures too.
    """

    min_p: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, min_p=FRACTION)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens too far below the likeliest one."""
        share = context.column(self.min_p, logits.dtype)
        distance = share.log() if isinstance(share, Tensor) else math.log(share) if share else NEVER
        return at_least(self.keep, cut(logits, logits, logits.amax(-1, keepdim=True) + distance), logits)


@dataclass(frozen=True)
class TopA(Filter):
    """Remove `p < a * (max p)^2`.

    Source: BlinkDL's RWKV.
    When: to use settings made for RWKV. It is `min_p` with a threshold that falls as the model is less sure.
    """

    a: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, a=FRACTION)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens too far below the square of the likeliest one."""
        p = logits.softmax(-1)
        left = cut(logits, p, context.column(self.a, p.dtype) * p.amax(-1, keepdim=True) ** 2)
        return at_least(self.keep, left, logits)


@dataclass(frozen=True)
class Epsilon(Filter):
    """Remove `p < epsilon`.

    Source: Hewitt, Manning and Liang, 2022, arXiv:2210.15191.
    When: rarely. A fixed threshold removes most where many words are possible; `eta_cutoff` corrects that.
    """

    epsilon: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, epsilon=BELOW_ONE)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens below a fixed probability."""
        p = logits.softmax(-1)
        return above(logits, p, context.column(self.epsilon, p.dtype), self.keep)


@dataclass(frozen=True)
class Eta(Filter):
    """Remove `p < min(epsilon, sqrt(epsilon) * exp(-H))`, where H is the entropy in nats.

    Source: Hewitt, Manning and Liang, 2022, arXiv:2210.15191.
    When: for a threshold that falls as the model is less sure. Values are small probabilities, unlike those of `min_p`.
    """

    epsilon: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, epsilon=BELOW_ONE)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens below a probability that falls as the distribution flattens."""
        p = logits.softmax(-1)
        epsilon = torch.as_tensor(context.column(self.epsilon), dtype=p.dtype, device=p.device)
        certainty = mean_logit(logits, p).exp() * p.amax(-1, keepdim=True)  # exp(-H)
        return above(logits, p, torch.minimum(epsilon, epsilon.sqrt() * certainty), self.keep)


@dataclass(frozen=True)
class TopNSigma(Filter):
    """Remove `z < max z - n * sigma`, where sigma is the standard deviation of the finite logits.

    Sigma is the population's (divided by their number). A temperature does not change which tokens stay.

    Source: Tang et al., 2024, arXiv:2411.07641.
    When: with high temperatures, because the set of tokens does not depend on the temperature. Bans change sigma.
    """

    n: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, n=NOT_NEGATIVE)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens too many deviations below the likeliest one."""
        n = torch.as_tensor(context.column(self.n), dtype=torch.float64, device=logits.device)
        count = count_possible(logits)
        mean = logits.nan_to_num(neginf=0).sum(-1, keepdim=True, dtype=torch.float64) / count
        spread = (logits - mean.to(logits.dtype)).nan_to_num_(neginf=0).square_()
        sigma = (spread.sum(-1, keepdim=True, dtype=torch.float64) / count).sqrt()
        border = torch.where(n > 0, logits.amax(-1, keepdim=True) - n * sigma, NEVER)
        return at_least(self.keep, cut(logits, logits, border.to(logits.dtype)), logits)


@dataclass(frozen=True)
class PLess(Filter):
    """Remove `p < the sum of all p^2`, the probability that two draws are equal. It has no parameter.

    Probabilities (.1, .15, .2, .25, .3) have the sum .225 and keep .25 and .3.

    Source: arXiv:2509.23234.
    When: to tune nothing. It is strict: if one token is much more likely than the others, only that one is kept.
    """

    keep: int = 1

    def __post_init__(self) -> None:
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens less likely than an agreement."""
        p = logits.softmax(-1)
        agreement = p.square().sum(-1, keepdim=True, dtype=torch.float64).to(p.dtype)
        # The sum is at most max p; where all are equal it is that, but for rounding.
        return at_least(self.keep, cut(logits, p, torch.minimum(agreement, p.amax(-1, keepdim=True))), logits)
