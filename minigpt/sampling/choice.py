"""From logits to a token: the likeliest one, or one drawn with a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of several: (B, V) -> (B,)."""
    return logits.argmax(-1)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes the row's uniform number: (B, V), (B,) -> (B,).

    A token at -inf has probability exactly zero and is never drawn. In double precision, since 50 000 rounded
    probabilities add up to an error that a single-precision sum would show.

    Args:
        logits: (B, V), of any floating dtype; a row that is not `is_choosable` gets some id or other.
        uniforms: (B,) float64 in [0, 1).
    """
    probabilities = logits.double().softmax(-1)
    # Zero where the probability is zero: such a token is never above the threshold, however a parallel sum was rounded.
    cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0)  # (B, V)
    # u < 1 keeps the threshold below the largest sum, and u = 0 passes at the first token that is possible at all.
    threshold = uniforms.unsqueeze(-1) * cumulative.amax(-1, keepdim=True)
    return (cumulative > threshold).int().argmax(-1)


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
