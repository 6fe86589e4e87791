"""Filters: each keeps a part of the distribution and forbids the rest.

Every filter acts on each row alone, leaves at least one token, and sees probabilities renormalised over what earlier
filters left. A parameter is a number, or one for each prompt of the call; `keep` is how many tokens survive at least.
p stands for softmax(z). Some filters cut at a border; the others keep the first tokens of a ranking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.sampling.draws.noise import Purpose
from minigpt.sampling.processors.processors import NEVER, Context, Parameter
from minigpt.sampling.processors.ranking import (
    FIRST,
    above,
    at_least,
    count_possible,
    cut,
    keep_first,
    keep_likeliest,
    keep_mass,
    mean_logit,
    rank,
)
from minigpt.sampling.settings.rules import (
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

TINY = 1e-300  # a mass that one token reaches


class Filter:
    """A processor that changes no logit but to -inf."""

    shaping: ClassVar[bool] = True


@dataclass(frozen=True)
class TopK(Filter):
    """Keep the k likeliest tokens, and whatever ties with the k-th (Fan, Lewis and Dauphin, 2018, arXiv:1805.04833)."""

    k: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, k=COUNT)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf where a token is less likely than the k-th."""
        size = logits.shape[-1]
        ranks = [int(min(max(k, self.keep), size)) for k in context.each(self.k)]
        most = max((k for k in ranks if k < size), default=0)
        if not most:
            return logits.clone()
        falling = logits.topk(most, dim=-1).values
        if min(ranks) == max(ranks):
            return cut(logits, logits, falling[:, -1:])
        places = torch.tensor(ranks, device=logits.device).unsqueeze(1)
        border = falling.gather(1, places.clamp(max=most) - 1)
        return cut(logits, logits, border.masked_fill(places == size, NEVER))


@dataclass(frozen=True)
class ExactTopK(Filter):
    """Keep exactly the k likeliest tokens; of equally likely ones the first (`TopK` keeps what ties with the k-th)."""

    k: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, k=COUNT)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for all but k tokens."""
        k = context.column(self.k)
        return keep_likeliest(logits, k.clamp(min=self.keep) if isinstance(k, Tensor) else max(k, self.keep))


@dataclass(frozen=True)
class TopP(Filter):
    """Keep the fewest likeliest tokens whose mass reaches p, at least one (Holtzman et al., 2019, arXiv:1904.09751).

    Probabilities (.5, .3, .1, .1) with p = .8 keep two. Of equally likely tokens the last ones go; p = 0 keeps the
    likeliest token; 1 is off.
    """

    p: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, p=FRACTION)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens before which the mass is reached."""
        p = context.column(self.p)
        p = p.clamp(min=TINY) if isinstance(p, Tensor) else max(p, TINY)
        keep = self.keep if self.keep > 1 else 0  # the rule keeps one by itself
        return keep_first(logits, self._gone, logits, p, keep=keep, off=p >= 1, further=self._further)

    def _gone(self, falling: Tensor, ids: Tensor, logits: Tensor, p: Tensor | float) -> Tensor:
        # In units of the likeliest token's likelihood, in which the masses of equally likely tokens are exact.
        first = (falling - falling[:, :1]).exp()
        sums = first.cumsum(-1, dtype=torch.float64)
        whole = sums[:, -1:]
        if falling.shape != logits.shape:
            longer = (falling[:, -1] > NEVER).nonzero().squeeze(1)  # rows with possible tokens beyond the first
            if len(longer):
                q = logits.index_select(0, longer).softmax(-1)
                rest = q.sum(-1, keepdim=True, dtype=torch.float64) / q.amax(-1, keepdim=True)
                whole = whole.index_copy(0, longer, rest)
        return sums - first >= p * whole

    def _further(self, logits: Tensor, keys: Tensor, _: Tensor, p: Tensor | float) -> Tensor:
        q = logits.softmax(-1)
        return keep_mass(logits, _reached, q, p * q.sum(-1, keepdim=True, dtype=torch.float64), keys, self.keep)


def _reached(falling: Tensor, ids: Tensor, p: Tensor, mass: Tensor) -> Tensor:
    """The rule by which the first tokens are kept until their probabilities reach a mass."""
    p = p.gather(1, ids).double()
    return (p.cumsum(-1) - p >= mass) | (falling == NEVER)


@dataclass(frozen=True)
class MinP(Filter):
    """Remove p < min_p * max p (Nguyen et al., 2024, arXiv:2407.01082); 0 is off."""

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
    """Remove p < a * (max p)^2, after BlinkDL's RWKV; 0 is off."""

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
    """Remove p < epsilon (Hewitt, Manning and Liang, 2022, arXiv:2210.15191); 0 is off."""

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
    """Remove p < min(epsilon, sqrt(epsilon) * exp(-H)), H the entropy in nats (same source as `Epsilon`); 0 is off."""

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
class Typical(Filter):
    """Keep the tokens whose surprise is closest to the entropy until their mass reaches `mass`, and what ties.

    Meister, Pimentel, Wiher and Cotterell, 2022, arXiv:2202.00666; 1 is off.
    """

    mass: Parameter
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, mass=POSITIVE_FRACTION)
        check(self, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tokens of too much or too little surprise."""
        mass = context.column(self.mass)
        p = logits.softmax(-1)
        # Surprise minus entropy is the mean logit minus the token's.
        distance = (logits - logits.amax(-1, keepdim=True)).sub_(mean_logit(logits, p)).abs_()
        whole = p.sum(-1, keepdim=True, dtype=torch.float64)
        return keep_first(
            logits,
            self._gone,
            p,
            mass * whole,
            keys=distance.neg_(),
            keep=self.keep,
            off=mass >= 1,
            further=self._further,
        )

    def _gone(self, falling: Tensor, ids: Tensor, p: Tensor, mass: Tensor) -> Tensor:
        missing = p.gather(1, ids).cumsum(-1, dtype=torch.float64) < mass
        last = missing.sum(-1, keepdim=True).clamp(max=ids.shape[1] - 1)
        return (falling < falling.gather(1, last)) | (falling == NEVER)

    def _further(self, logits: Tensor, keys: Tensor, p: Tensor, mass: Tensor) -> Tensor:
        return keep_mass(logits, self._gone, p, mass, keys, self.keep)


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

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the tail."""
        z, size = context.column(self.z), logits.shape[-1]
        off = (z >= 1) if size > 2 else True
        return keep_first(logits, self._gone, z, size, keep=self.keep, off=off)

    def _gone(self, falling: Tensor, ids: Tensor, z: Tensor | float, size: int) -> Tensor:
        p = (falling.double() - falling[:, :1]).exp()
        spent = p.diff(n=2).abs().cumsum(-1)  # (R, k - 2)
        # A bend is at most the sum of the falls on its two sides, so those of tokens not seen are at most 2 p together.
        # Where that leaves the answer open, nothing goes, and more tokens are asked for.
        unseen = 0 if ids.shape[1] == size else 2 * p[:, -2:-1]
        beyond = spent > z * (spent[:, -1:] + unseen)
        agreed = (beyond == (spent > z * spent[:, -1:])).all(-1, keepdim=True)
        return torch.cat((beyond[:, :1], beyond, beyond[:, -1:]), dim=1) & agreed


@dataclass(frozen=True)
class TopNSigma(Filter):
    """Remove z < max z - n * sigma (Tang et al., 2024, arXiv:2411.07641); 0 is off.

    Sigma is the population's standard deviation of the finite logits, so that a temperature changes nothing here.
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
class TopH(Filter):
    """Keep the likeliest tokens while the sum of their -p ln p stays within h of the whole (arXiv:2509.02510).

    As in transformers, the whole is the distribution of the `top_n` likeliest tokens, beyond which nothing is kept but
    what `keep` asks for. 1 is off.
    """

    h: Parameter
    top_n: int = 100
    keep: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, h=POSITIVE_FRACTION)
        check(self, top_n=COUNT, keep=COUNT)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for all after the share h of the entropy."""
        h, width = context.column(self.h), max(FIRST, int(self.top_n) + 1)
        return keep_first(logits, self._gone, h, keep=self.keep, off=h >= 1, width=width)

    def _gone(self, falling: Tensor, ids: Tensor, h: Tensor | float) -> Tensor:
        terms = torch.special.entr(falling[:, : int(self.top_n)].double().softmax(-1))
        gone = torch.ones_like(falling, dtype=torch.bool)
        beyond = terms.cumsum(-1) > h * terms.sum(-1, keepdim=True)
        gone[:, : int(self.top_n)] = beyond | (terms == 0)  # too unlikely to have a probability
        return gone


@dataclass(frozen=True)
class PLess(Filter):
    """Remove p < the sum of all p^2, the chance that two draws agree (arXiv:2509.23234). It has no strength to set.

    Probabilities (.1, .15, .2, .25, .3) have the sum .225 and keep .25 and .3.
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

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with -inf for the top choices but the last, in the rows whose coin says so."""
        size = logits.shape[-1]
        check_vocabulary(self, max(self.spare, default=0), size)
        # 1 / threshold tokens at most reach it; one more tells where they end.
        lowest = min(context.each(self.threshold))
        falling, ids = rank(logits, size if lowest * size < 2 else int(1 / lowest) + 2)
        p = logits.softmax(-1).gather(1, ids)
        # A token that is impossible is no choice, even at threshold 0.
        top = (p >= context.column(self.threshold, p.dtype)) & (falling > NEVER)
        least = p.gather(1, (top.sum(-1, keepdim=True) - 1).clamp(min=0))
        first_least = (p > least).sum(-1, keepdim=True)
        go = top.scatter(1, first_least, False)
        stay = context.uniform(Purpose.XTC).unsqueeze(1) >= context.column(self.probability)
        if self.spare:
            spare = torch.tensor(self.spare, device=ids.device)
            stay |= (go & torch.isin(ids, spare)).any(-1, keepdim=True)
        if self.keep > 1:
            stay |= count_possible(logits) - go.sum(-1, keepdim=True) < self.keep
        return logits.scatter(1, ids, falling.masked_fill(go & ~stay, NEVER))
