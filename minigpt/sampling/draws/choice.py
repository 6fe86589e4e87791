"""Logits -> token: the argmax, or a draw with a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # probabilities that are added up as one, and one by one only where the choice falls
BELOW_ONE = 1 - 2.0**-53


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of several: (B, V) -> (B,)."""
    return logits.argmax(-1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes the row's uniform number: (B, V), (B,) -> (B,).

    A token at -inf has probability exactly zero and is never drawn. Probabilities are added up in double precision,
    since the rounding of 50 000 single-precision sums would show.

    Args:
        logits: (B, V), of any floating dtype; a row that is not `is_choosable` gets some id or other.
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
    # Given the block, what is left of the number tells the place in it; rounding may move it out by a hair.
    ends, own = sums.cumsum(-1), sums.gather(1, block)
    left = (uniforms * ends[:, -1:] - ends.gather(1, block) + own) / own
    return (block * BLOCK + _passing(inside, left.clamp(0, BELOW_ONE))).squeeze(-1)


def _passing(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Where the sum of the weights passes a share of the whole, never at a weight of 0: (B, N), (B, 1) -> (B, 1)."""
    # Zero at a weight of 0: such a place is never above the threshold, however a parallel sum was rounded.
    sums = weights.cumsum(-1, dtype=torch.float64).masked_fill_(weights == 0, 0)
    # u < 1 keeps the threshold below the largest sum, and u = 0 passes at the first place that counts at all.
    return (sums > uniforms * sums.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)


def choose(logits: Tensor, uniforms: Tensor | None, greedy_rows: list[bool]) -> Tensor:
    """Greedy rows by `greedy`, the others by `draw`: (B, V) -> (B,); uniforms may be None where every row is greedy."""
    if uniforms is None or all(greedy_rows):
        return greedy(logits)
    drawn = draw(logits, uniforms)
    if not any(greedy_rows):
        return drawn
    return torch.where(torch.tensor(greedy_rows, device=logits.device), greedy(logits), drawn)


def is_choosable(logits: Tensor) -> Tensor:
    """Whether a row has a token to choose, which NaN, +inf and -inf everywhere rule out: (..., V) -> (...) bool."""
    return logits.amax(-1).isfinite()
