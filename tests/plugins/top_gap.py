"""A processor: cut at the largest fall between neighbours among the n highest logits."""

from dataclasses import dataclass

import torch

import minigpt


@minigpt.register("processor", "top_gap", help="cut at the largest fall among the n highest logits", off=0)
@dataclass(frozen=True)
class TopGap:
    n: int
    keep: int = 1

    def __call__(self, context, logits, state=None):  # (B, V) -> (B, V)
        best = logits.topk(min(self.n + 1, logits.shape[-1]), -1).values  # (B, n + 1)
        fall = (best[:, :-1] - best[:, 1:]).nan_to_num(0.0).argmax(-1).clamp(min=self.keep - 1)
        return logits.masked_fill(logits < best.gather(1, fall[:, None]), -torch.inf)
