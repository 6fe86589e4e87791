"""The norms. A norm is a module over the last axis, made as Norm(width, config).

A norm that analyses can see through divides its input by one number per position (`divides`). Then
norm(x) = (x - mean(x)) / scale * weight + bias, without the mean unless it is `centred`, and without weight and bias
where they are None. `explicit` is its forward pass with a tap at every activation in `hooks`. `begin` sets the start
values of its parameters. Without `explicit` the output is tapped as hook_normalized; without `begin` the constructor's
values stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import byhand
from minigpt.model.config import NORMS
from minigpt.model.precision import widen

if TYPE_CHECKING:
    from minigpt.model.config import GPTConfig

Tap = Callable[[str, Tensor], Tensor]

HOOKS = {"hook_scale": "divisor of the norm", "hook_normalized": "output of the norm, before weight and bias"}
OUTPUT = {"hook_normalized": "output of the norm"}


class LayerNorm(nn.LayerNorm):
    """Layer normalization with weight and optional bias (Ba et al. 2016, arXiv 1607.06450)."""

    divides, centred = True, True
    hooks: ClassVar = HOOKS

    def __init__(self, width: int, config: GPTConfig) -> None:
        super().__init__(width, eps=config.norm_eps, bias=bool(config.bias))

    def begin(self, generator: torch.Generator | None) -> None:
        """Weight 1, bias 0."""
        self.reset_parameters()

    def explicit(self, x: Tensor, tap: Tap, at: str) -> Tensor:  # (..., C) -> (..., C)
        """Forward pass with taps; hook_scale (..., 1) is the divisor of the centred input."""
        wide = widen(x)
        y = _divided(wide - wide.mean(-1, keepdim=True), self.eps, x.dtype, tap, at) * self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    The weight is None if the config has no norm weights.
    """

    divides, centred = True, False
    hooks: ClassVar = HOOKS
    bias = None

    def __init__(self, width: int, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None

    def begin(self, generator: torch.Generator | None) -> None:
        """Weight 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if byhand.suits(x):
            y = byhand.ScaledToUnit.apply(x, self.eps)
            return y if self.weight is None else y * self.weight
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)

    def explicit(self, x: Tensor, tap: Tap, at: str) -> Tensor:  # (..., C) -> (..., C)
        """Forward pass with taps; hook_scale (..., 1) is the divisor of the input."""
        y = _divided(widen(x), self.eps, x.dtype, tap, at)
        return y if self.weight is None else y * self.weight


def _divided(wide: Tensor, eps: float, dtype: torch.dtype, tap: Tap, at: str) -> Tensor:
    scale = tap(f"{at}hook_scale", (wide.square().mean(-1, keepdim=True) + eps).sqrt())
    return tap(f"{at}hook_normalized", (wide / scale).to(dtype))


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """Create the norm selected by the config, over `width` channels."""
    return NORMS.bound(str(config.norm), config.own("norm"))(width, config)


def explicit_norm(norm: nn.Module, x: Tensor, tap: Tap | None = None, at: str = "") -> Tensor:  # (..., C) -> (..., C)
    """A norm with taps at its activations."""
    tap = tap or (lambda name, activation: activation)
    if hasattr(norm, "explicit"):
        return norm.explicit(x, tap, at)  # type: ignore[operator]
    return tap(f"{at}hook_normalized", norm(x))


def hooks_of(config: GPTConfig) -> dict[str, str]:
    """The activations of the config's norm, by name, with their meaning."""
    return getattr(NORMS[str(config.norm)], "hooks", OUTPUT)
