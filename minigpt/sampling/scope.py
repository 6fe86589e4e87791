"""Which of a row's tokens a processor looks back at: prompt, output or both, all or the last n, never the padding."""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.sampling.processors import Context


def span(context: Context, scope: str, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The first position that counts, and the one after the last: (B,) int64 each.

    Args:
        context: the rows.
        scope: "prompt", "output" (what was written after the prompt) or "both".
        window: only the last n positions of the scope; None for all.
    """
    stop = context.prompt_lengths if scope == "prompt" else context.lengths
    start = context.prompt_lengths if scope == "output" else torch.zeros_like(stop)
    return (start if window is None else torch.maximum(start, stop - int(window))), stop


def seen(context: Context, scope: str, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The tokens in a scope and how often each occurs in it: (B, L) int64 each.

    Each place holds a token that counts, so that writing a token's new logit from each of its places writes one value.
    A row in which nothing counts holds one token everywhere, with the count 0.
    """
    start, stop = span(context, scope, window)
    place = torch.arange(context.ids.shape[1], device=context.ids.device)
    inside = (place >= start[:, None]) & (place < stop[:, None])
    last = context.ids.gather(1, (stop - 1).clamp(min=0)[:, None])
    ids = torch.where(inside, context.ids, last)
    ordered = torch.where(inside, context.ids, -1).sort(dim=-1).values
    return ids, torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
