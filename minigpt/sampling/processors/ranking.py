"""Building blocks of filters: a threshold, and the top of a ranking without sorting the vocabulary.

Sorting 50 000 logits takes thirty times as long as finding the first hundred, which are nearly always enough. So a
rule on the ranking first gets the first hundred. Only rows that need more are ranked further, up to the full ranking.
The kept tokens are those of the full ranking, and a row never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minigpt.sampling.processors.processors import NEVER

FIRST = 128  # tokens that are ranked before more are asked for
WIDER = 4  # how many times as many, then
BINS = 8192  # `keep_mass` counts in so many steps
DEPTH = 40.0  # and no finer than this below the top: of e^-40 nothing can be left
SMALL = 4096  # logits of a batch up to which a call costs more than its work


def cut(logits: Tensor, values: Tensor, border: Tensor) -> Tensor:
    """Logits with -inf where a value lies below the border: (B, V), (B, V), (B, 1) -> (B, V); -inf keeps everything."""
    if logits.numel() <= SMALL:
        return torch.where(values < border, NEVER, logits)
    # On a CPU, comparing and masking take four times as long as this arithmetic: 0 for what stays, else -inf, is added.
    limits = torch.finfo(values.dtype)
    below = values - border.clamp(min=limits.min)  # not -inf, from which -inf cannot be taken
    return torch.threshold_(below.clamp_(max=0), -limits.tiny, NEVER).add_(logits)


def only_possible(values: Tensor, logits: Tensor) -> Tensor:
    """Values made from logits, with -inf wherever the logits have it: (B, V) both."""
    return (logits - logits.clamp(min=torch.finfo(logits.dtype).min)).add_(values)


def count_possible(logits: Tensor) -> Tensor:
    """How many tokens are possible: (B, V) -> (B, 1), of the same dtype."""
    impossible = logits.mul(0).nan_to_num_(nan=1)  # quicker than comparing: infinity times 0 is no number
    return logits.shape[-1] - impossible.sum(-1, keepdim=True)


def mean_logit(logits: Tensor, p: Tensor) -> Tensor:
    """The logit to be expected of a draw, the likeliest one's being 0: (B, V) and its softmax -> (B, 1).

    The entropy in nats is -mean_logit - ln max p: a token's surprise is -ln max p plus what its logit lacks to the top.
    """
    below = logits - logits.amax(-1, keepdim=True)
    return below.clamp_(min=torch.finfo(logits.dtype).min).mul_(p).sum(-1, keepdim=True)


def rank(keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest keys, falling, of equals the first, and their places: (B, V) -> (B, width) both, or (B, V) if close.

    Less than all of them hold every key above the last one; of those equal to the last one, any.
    """
    if 2 * width > keys.shape[-1]:
        falling, places = keys.sort(dim=-1, descending=True, stable=True)
        return falling, places
    falling, places = keys.topk(width, dim=-1)
    if (falling.diff(dim=-1) == 0).any():
        places, order = places.sort(dim=-1)
        falling, order = falling.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        places = places.gather(-1, order)
    return falling, places


def keep_first(
    logits: Tensor,
    gone: Callable[..., Tensor],
    *given: Any,
    keys: Tensor | None = None,
    keep: int = 0,
    off: bool | Tensor = False,
    width: int = FIRST,
    further: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Logits with -inf for the tokens that a rule on their ranking removes: (B, V) -> (B, V).

    Args:
        logits: (B, V); they are also what is ranked, unless there are keys.
        gone: (falling keys (R, k), their tokens (R, k), *given) -> (R, k) bool: which go, from some place on all. It
            gets R of the rows, and the first k < V of their tokens, or all. As long as it keeps the last of these (and
            what is equal to that), it is asked again, with more.
        given: what else the rule needs: plain values, and tensors with a row axis, of which it gets its rows.
        keys: rank by these (B, V) instead; what has -inf is impossible.
        keep: how many survive whatever the rule says.
        off: where everything is kept, (B, 1) or for all rows.
        width: how many to begin with.
        further: does the rows that need more instead: (logits (R, V), keys (R, V), *given) -> (R, V).
    """
    if off is True:
        return logits.clone()
    falling, ids = rank(logits if keys is None else keys, width)
    go = gone(falling, ids, *given)
    if keep:
        go[:, :keep] = False
    values = (falling if keys is None else logits.gather(1, ids)).masked_fill(go, NEVER)
    if values.shape == logits.shape:
        result = values.scatter(1, ids, values)
    else:
        result = torch.full_like(logits, NEVER).scatter_(1, ids, values)
        last = falling[:, -1:]
        # Once impossible tokens are reached, there are no others.
        undecided = (~go & (falling == last)).any(-1, keepdim=True) & (last > NEVER)
        broken = ~falling[:, 0].isfinite()  # no distribution: left as it is, for others to find
        if broken.any():
            result[broken] = logits[broken]
            undecided &= ~broken.unsqueeze(1)
        if isinstance(off, Tensor):
            undecided &= ~off
        rows = undecided.squeeze(1).nonzero().squeeze(1)
        if len(rows):
            part, ranked, *rest = (
                x.index_select(0, rows) if isinstance(x, Tensor) else x for x in (logits, keys, *given)
            )
            if further:
                result[rows] = further(part, part if ranked is None else ranked, *rest)
            else:
                result[rows] = keep_first(part, gone, *rest, keys=ranked, keep=keep, width=WIDER * width)
    return torch.where(off, logits, result) if isinstance(off, Tensor) and off.any() else result


def keep_mass(
    logits: Tensor, gone: Callable[..., Tensor], p: Tensor, mass: Tensor, keys: Tensor, keep: int = 1
) -> Tensor:
    """`keep_first` for a rule on mass, at a cost that does not grow with the number of tokens kept: (R, V) -> (R, V).

    The probabilities are added up in bins by key, which tells the bin that the mass ends in. What is ranked above is
    kept, and the ranking begins at the bin's own tokens, with the mass that is left for them.

    Args:
        logits: (R, V).
        gone: the rule; it is given p and the mass.
        p: (R, V) probabilities.
        mass: (R, 1) float64, what the kept tokens' probabilities have to reach.
        keys: (R, V) to rank by.
        keep: how many survive at least.
    """
    depth = keys.amax(-1, keepdim=True) - keys
    deepest = depth.nan_to_num(posinf=0).amax(-1, keepdim=True).clamp_(1e-6, DEPTH)
    bins = depth.mul_(BINS / deepest).clamp_(max=BINS - 1).floor_()
    sums = p.new_zeros((len(p), BINS), dtype=torch.float64).scatter_add_(1, bins.long(), p.double())
    ends = sums.cumsum(-1)
    border = (ends < mass).sum(-1, keepdim=True).clamp(max=BINS - 1)
    left = (mass - (ends - sums).gather(1, border)).clamp(min=1e-300)  # the bin's first token is always needed
    border = border.to(bins.dtype)
    rest = keep_first(logits, gone, p, left, keys=cut(keys, bins, border))
    result = torch.maximum(rest, cut(logits, -bins, 1 - border))
    if keep > 1:
        return torch.maximum(result, keep_first(logits, from_place, keep, keys=keys))
    return result


def from_place(falling: Tensor, ids: Tensor, k: Tensor | float) -> Tensor:
    """The rule by which the first k tokens are kept; k is a number or (R, 1)."""
    return (torch.arange(falling.shape[1], device=falling.device) >= k).expand(falling.shape).clone()


def keep_likeliest(logits: Tensor, k: Tensor | float) -> Tensor:
    """Logits with -inf for all but exactly k tokens, of equals the first: (B, V), a number or (B, 1) of 1 or more."""
    return keep_first(logits, from_place, k, off=k >= logits.shape[-1])


def at_least(keep: int, left: Tensor, logits: Tensor) -> Tensor:
    """What a filter left of the logits, and exactly the `keep` likeliest tokens besides; it leaves one by itself."""
    return torch.maximum(left, keep_likeliest(logits, keep)) if keep > 1 else left


def above(logits: Tensor, p: Tensor, border: Tensor | float, keep: int) -> Tensor:
    """Logits with -inf where p is below the border, but for the `keep` likeliest tokens and what ties with them."""
    left = cut(logits, p, p.amax(-1, keepdim=True).clamp(max=border))
    if keep == 1:
        return left
    falling = logits.topk(min(keep, logits.shape[-1]), dim=-1).values
    return torch.maximum(left, cut(logits, logits, falling[:, -1:]))
