"""Logits -> token: the argmax, or a draw with a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # probabilities are summed in blocks of this size; only the chosen block is searched one by one
BELOW_ONE = 1 - 2.0**-53


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, the first one in a tie: (B, V) -> (B,)."""
    return logits.argmax(-1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the token at which the cumulative distribution passes the uniform number, (B,) int64.

    A token at -inf has probability exactly zero and is never sampled. Probabilities are summed in double precision,
    because rounding errors of 50 000 single-precision additions would be noticeable.

    Args:
        logits: (B, V), of any floating dtype; the result for a row that is not `is_choosable` is arbitrary.
        uniforms: (B,) float64 in [0, 1).
    """
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    uniforms = uniforms.unsqueeze(-1)
    if p.shape[-1] <= BLOCK:
        return _passing(p, uniforms).squeeze(-1)
    blocks = pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # (B, N, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    block = _passing(sums, uniforms)  # (B, 1)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    # The rest of the number, rescaled, selects the token in the block; rounding can push it slightly out of [0, 1).
    ends, own = sums.cumsum(-1), sums.gather(1, block)
    left = (uniforms * ends[:, -1:] - ends.gather(1, block) + own) / own
    return (block * BLOCK + _passing(inside, left.clamp(0, BELOW_ONE))).squeeze(-1)


def _passing(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First index where the cumulative sum exceeds a fraction of the total: (B, N), (B, 1) -> (B, 1).

    An index with weight 0 is never returned.
    """
    # Set to zero at weight 0, so that such an index is never above the threshold, however a parallel sum is rounded.
    sums = weights.cumsum(-1, dtype=torch.float64).masked_fill_(weights == 0, 0)
    # u < 1 keeps the threshold below the largest sum; u = 0 selects the first index with a positive weight.
    return (sums > uniforms * sums.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)


def choose(logits: Tensor, uniforms: Tensor | None, greedy_rows: list[bool]) -> Tensor:
    """Choose by `greedy` in greedy rows, by `draw` in the others: (B, V) -> (B,).

    `uniforms` may be None if every row is greedy.
    """
    if uniforms is None or all(greedy_rows):
        return greedy(logits)
    drawn = draw(logits, uniforms)
    if not any(greedy_rows):
        return drawn
    return torch.where(torch.tensor(greedy_rows, device=logits.device), greedy(logits), drawn)


def is_choosable(logits: Tensor) -> Tensor:
    """Whether a row's largest logit is finite (no NaN, no +inf, not -inf everywhere): (..., V) -> (...) bool."""
    return logits.amax(-1).isfinite()
