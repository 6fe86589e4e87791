"""Two conversions: at least float32 for sums and softmax; float64 for exact differences."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Convert to at least float32: half precision becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def precise(x: Tensor) -> Tensor:
    """Convert to float64 on the CPU, because not every device supports float64."""
    return x.detach().cpu().double()
