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
    """The tokens in a scope: ids (B, L) int64, and whether each of them is in it, (B, L) bool.

    A place outside of the scope holds token 0, which may be in it elsewhere. So each place may write what becomes of
    its token: places of equal tokens agree.
    """
    ids, inside = _marked(context, scope, window)
    return ids, inside | ((ids == 0) & inside).any(1, keepdim=True)


def occurrences(context: Context, scope: str, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The same ids, and how often each occurs in the scope: (B, L) int64 each."""
    ids, inside = _marked(context, scope, window)
    ordered = torch.where(inside, ids, -1).sort(dim=-1).values
    return ids, torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def _marked(context: Context, scope: str, window: int | None) -> tuple[Tensor, Tensor]:
    start, stop = span(context, scope, window)
    place = torch.arange(context.ids.shape[1], device=context.ids.device)
    inside = (place >= start[:, None]) & (place < stop[:, None])
    return torch.where(inside, context.ids, 0), inside
