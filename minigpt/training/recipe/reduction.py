"""Sum over all processes of a run."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """All-reduce a tensor by summation; return it unchanged if there is only one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor.clone()
        dist.all_reduce(shared)
        return shared.to(tensor.device)
    return tensor
