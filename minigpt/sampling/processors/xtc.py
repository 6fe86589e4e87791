"""XTC, the filter that removes the most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.sampling.draws.noise import Purpose
from minigpt.sampling.processors.processors import NEVER, Context, Filter, Parameter
from minigpt.sampling.processors.ranking import count_possible, rank
from minigpt.sampling.settings.rules import COUNT, FRACTION, check, check_numbers, check_vocabulary, token_ids


@dataclass(frozen=True)
class XTC(Filter):
    """Exclude top choices: with `probability`, remove all tokens with `p >= threshold` except the least likely of them.

    A row is not changed if it has fewer than two such tokens (always so for a threshold above .5), if a token of
    `spare` (an end token, a line break) would be removed, or if fewer than `keep` tokens would be left.

    Source: p-e-w, 2024.
    When: against stock phrases in fiction. It removes the most likely word on purpose: do not use it for facts or code.
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
