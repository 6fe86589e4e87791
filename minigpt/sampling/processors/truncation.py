"""Filters that keep the top of a ranking and forbid the rest; `borders` has those with a threshold.

Every filter acts on each row alone, leaves at least one token, and sees probabilities renormalised over what earlier
filters left. A parameter is a number, or one for each prompt of the call; `keep` is how many tokens survive at least.
p stands for softmax(z).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.sampling.processors.processors import NEVER, Context, Filter, Parameter
from minigpt.sampling.processors.ranking import (
    FIRST,
    cut,
    keep_first,
    keep_likeliest,
    keep_mass,
    mean_logit,
)
from minigpt.sampling.settings.rules import (
    COUNT,
    FRACTION,
    POSITIVE_FRACTION,
    check,
    check_numbers,
)

TINY = 1e-300  # a mass that one token reaches


@dataclass(frozen=True)
class TopK(Filter):
    """Keep the k likeliest tokens, and every token that ties with the k-th.

    Source: Fan, Lewis and Dauphin, 2018, arXiv:1805.04833.
    When: as a blunt safety net; it keeps as many candidates where the model is sure as where it is not. Seldom needed
    beside `top_p` or `min_p`.
    """

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
    """Keep exactly the k likeliest tokens of `top_k`; of those that tie with the k-th, the first ones.

    When: to compare with a library that does so; logits are seldom equal, so it seldom matters.
    """

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
    """Keep the fewest likeliest tokens whose probabilities add up to p, at least one (nucleus sampling).

    Probabilities (.5, .3, .1, .1) with p = .8 keep two. Of equally likely tokens the last ones go; p = 0 keeps the
    likeliest token.

    Source: Holtzman et al., 2019, arXiv:1904.09751.
    When: the usual filter. After a high temperature it lets much of the tail in again; then prefer `min_p`.
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
class Typical(Filter):
    """Keep the tokens whose surprise is closest to the entropy until their probabilities add up to `mass`, with ties.

    Source: Meister, Pimentel, Wiher and Cotterell, 2022, arXiv:2202.00666.
    When: for less predictable prose. It may remove the likeliest token, so not where there is one right answer.
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
    """Cut where the curve of falling probabilities has spent the share z of its bends.

    The bends are the absolute second differences of p in falling order. Token i + 1 (counted from 0) goes once the
    bends up to number i make up more than z of all. A row without bends (all equally likely) keeps all.

    Source: Phénix and Egan, 2019.
    When: for settings of older programs; llama.cpp has dropped it. `min_p` has a plainer meaning.
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
class TopH(Filter):
    """Keep the likeliest tokens while the sum of their `-p ln p` stays within the share h of the whole.

    As in transformers, the whole is the distribution of the `top_n` likeliest tokens, beyond which nothing is kept but
    what `keep` asks for.

    Source: arXiv:2509.02510.
    When: to bound the entropy in place of the probability mass. Compare it with `top_p` on your own text.
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
