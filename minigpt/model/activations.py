"""The activations of the MLP: functions of `pre`, or of `pre` and `gate` where they are gated; (..., inner) -> same."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minigpt.model import byhand


def gelu(pre: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(pre, approximate="tanh")


def gelu_exact(pre: Tensor) -> Tensor:
    """GELU with the error function."""
    return F.gelu(pre, approximate="none")


def relu2(pre: Tensor) -> Tensor:
    """Squared ReLU (So et al. 2021, arXiv 2109.08668)."""
    return byhand.SquaredReLU.apply(pre) if byhand.suits(pre, half=True) else F.relu(pre).square()


def swiglu(pre: Tensor, gate: Tensor) -> Tensor:
    """Pre times SiLU(gate) (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * pre
