"""What analyses of sums assume of the norms: given its divisor, a norm is linear in the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.model.config import GPTConfig


def dividing(norm: nn.Module, config: GPTConfig, what: str) -> Any:
    """The norm, if it divides its input by one number per position (see minigpt/model/norms.py).

    Raises ConfigError if it does not, so that `what` has no answer for this model.
    """
    if not getattr(norm, "divides", False):
        raise ConfigError(
            f"{what}: does not exist for norm '{config.norm}', because it assumes a norm that divides the residual "
            f"stream by one number per position"
        )
    return norm


def through(norm: Any, towards: Tensor) -> Tensor:  # (..., C) -> (..., C)
    """The direction in the stream before a norm that belongs to one after it, up to the norm's divisor:
    (x - mean x) * weight . d = x . (weight * d - mean(weight * d)).
    """
    if norm.weight is not None:
        towards = towards * norm.weight.to(towards)
    return towards - towards.mean(-1, keepdim=True) if norm.centred else towards
