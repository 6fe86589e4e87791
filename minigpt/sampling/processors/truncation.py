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
    """Keep the k most likely tokens, and every token as likely as the k-th.

    Source: Fan, Lewis and Dauphin, 2018, arXiv:1805.04833.
    When: as a simple limit. It keeps the same number of tokens whether the model is sure or not; with `top_p` or
    `min_p` it is rarely needed.
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
    """Keep exactly the k most likely tokens of `top_k`; of tokens as likely as the k-th, those with the lowest ids.

    When: to compare with a library that does the same. Logits are rarely equal, so it rarely matters.
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
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p (nucleus sampling).

    Probabilities (.5, .3, .1, .1) with p = .8 keep two. Of equally likely tokens the last ones go; p = 0 keeps the
    likeliest token.

    Source: Holtzman et al., 2019, arXiv:1904.09751.
    When: the usual filter. At a high temperature it keeps much of the tail; then prefer `min_p`.
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
    """Keep the tokens whose surprise is closest to the entropy until their probabilities sum to `mass`; ties are kept.

    Source: Meister, Pimentel, Wiher and Cotterell, 2022, arXiv:2202.00666.
    When: for less predictable prose. It may remove the most likely token, so do not use it for tasks with one answer.
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
    """Cut the sorted probabilities where their second differences reach the share z of their sum.

    With p sorted in falling order and d its absolute second differences, token i + 1 (counted from 0) is removed once
    d_0 + ... + d_i is more than z of the sum of all d. If all tokens are equally likely, all are kept.

    Source: Phénix and Egan, 2019.
    When: to use settings of older programs; llama.cpp has removed it. `min_p` is easier to understand.
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
    """Keep the most likely tokens while the sum of their `-p ln p` is at most the share h of the entropy.

    As in transformers, the entropy is that of the `top_n` most likely tokens, and no other token is kept unless `keep`
    requires it.

    Source: arXiv:2509.02510.
    When: to limit the entropy instead of the probability mass. Compare it with `top_p` on your own text.
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
