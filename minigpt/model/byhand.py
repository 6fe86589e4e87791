"""Three functions with hand-written backward passes, for training on a CPU.

On a CPU their cost is memory traffic. PyTorch's autograd of the plain formulas makes more passes over memory than
necessary. On other devices a compiler or a fused kernel solves this, so other devices, half precision and inference
use the plain formulas in layers.py. Tests compare both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def suits(x: Tensor, half: bool = False) -> bool:
    """Whether to use the functions of this module for x.

    Args:
        x: the input.
        half: also accept half precision; for functions without intermediate rounding.
    """
    plain = x.device.type == "cpu" and (half or x.dtype in (torch.float32, torch.float64))
    return plain and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class ScaledToUnit(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) over the last axis; dx = (dy - y mean(y dy)) / sqrt(mean(x^2) + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:  # (..., C) -> (..., C)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass over memory; x.square().mean() needs two
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        along = (gradient * y).mean(-1, keepdim=True)  # (..., 1)
        return torch.addcmul(gradient, y, along, value=-1).mul_(inverse), None


class SquaredReLU(torch.autograd.Function):
    """y = max(x, 0)^2; dx = 2 max(x, 0) dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class Rotated(torch.autograd.Function):
    """Rotary embedding: rotates the channel pairs (i, i + D/2); backward rotates the gradient by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (..., T, D), (..., T, D) with sin's sign
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half])
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y
