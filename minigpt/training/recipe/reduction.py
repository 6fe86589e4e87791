"""Sum tensors over all processes of a run."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """All-reduce: every process gets the sum of all tensors; with one process, the tensor itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor.clone()
        dist.all_reduce(shared)
        return shared.to(tensor.device)
    return tensor
