"""Which tokens of a row a processor counts: prompt, output or both, all or the last n, never padding."""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.sampling.processors.processors import Context


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
    """The tokens in a scope: ids (B, L) int64, and whether a row has any, (B, 1) bool.

    A place outside of the scope holds the scope's first token (some token, where there is none). So each place may
    write what becomes of its token: places of equal tokens agree.
    """
    start, stop = span(context, scope, window)
    first = context.ids.gather(1, start.clamp(max=context.ids.shape[1] - 1)[:, None])
    return torch.where(_inside(context, start, stop), context.ids, first), (stop > start)[:, None]


def occurrences(context: Context, scope: str, window: int | None, like: Tensor) -> Tensor:
    """How often each token occurs in the scope: (B, V), shape and dtype those of a given tensor."""
    inside = _inside(context, *span(context, scope, window))
    # Outside, 0 is added to whatever token is there.
    return torch.zeros_like(like).scatter_add_(1, context.ids, inside.to(like.dtype))


def _inside(context: Context, start: Tensor, stop: Tensor) -> Tensor:
    place = torch.arange(context.ids.shape[1], device=context.ids.device)
    return (place >= start[:, None]) & (place < stop[:, None])
