"""Sharded weights (FSDP2): each process keeps a shard of every tensor and gathers a block's full weights to use them.

This uses torch's fully_shard (Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020, arXiv 1910.02054). It
computes the same as replicated weights in a fraction of the memory. A sharded tensor is a DTensor, split along its
rows, which knows its full shape and its process group. All functions here return an ordinary tensor unchanged.
"Collective" marks functions that all processes must call at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minigpt.checkpoint.checkpoint import empty_model, state_of
from minigpt.model.gpt import GPT

Loss = Callable[[GPT, Tensor, Tensor], Tensor]


def shard(model: GPT, device: torch.device, loss: Loss, low: torch.dtype | None = None) -> Loss:
    """Shard the model's weights in place. Collective; every process must start with the same weights.

    A block's weights are gathered for its forward pass, freed, and gathered again for its backward pass. Embedding,
    final norm and unembedding stay gathered from forward to backward, as one unit, so that tied weights stay tied.
    Gradients are averaged in float32 and then sharded like the weights.

    Args:
        model: the full model, on any device.
        device: device of the shards.
        loss: (model, ids, targets) -> scalar.
        low: the autocast dtype of matrix products, or None. Blocks then communicate their weights in this dtype, which
            halves the bytes. The residual stream and the embedding keep their dtype.

    Returns:
        The loss as a forward method of the sharded model, which gathers the weights first.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.trunk.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    model.register_forward_hook(_reshard)
    model.training_loss = MethodType(loss, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "training_loss")
    return lambda model, ids, targets: model.training_loss(ids, targets)  # type: ignore[operator]


def _reshard(model: nn.Module, ids: object, logits: object) -> None:
    """Forward hook: free the gathered weights after a forward pass without gradients, which no backward pass frees."""
    assert isinstance(model, FSDPModule)
    if not torch.is_grad_enabled():
        model.reshard()


def is_sharded(model: GPT) -> bool:
    """Whether the model's weights are sharded."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard as a view: in-place changes apply to the shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor: gathers shards, or completes a pending (partial) sum over processes. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Move a full tensor to the device of `other` (same shape) and shard it in the same way."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def share_out(tensors: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """Shard full tensors, given by parameter name, like the model's parameters of the same name and shape."""
    laid_out = dict(tensors)
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].shape == parameter.shape:  # loading reports a wrong shape
            laid_out[name] = like(tensors[name], parameter)
    return laid_out


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors into the first process's main memory; other processes get {}. Collective.

    Gathers one tensor at a time, so that no device holds more than one full tensor. If no tensor is sharded, returns
    the dict unchanged on every process.
    """
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return tensors
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if dist.get_rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def plain(model: GPT) -> GPT | None:
    """Return an unsharded model to sample from. Collective.

    Returns:
        The model itself if it is not sharded. Otherwise a copy in main memory on the first process, and None on others.
    """
    if not is_sharded(model):
        return model
    weights = gather(state_of(model))
    if not weights:
        return None
    copy = empty_model(model.config, dtype=model.unembed.weight.dtype, device="cpu")
    for name, parameter in copy.named_parameters():
        parameter.data.copy_(weights[name])
    return copy.eval()


def by_whole_matrices(
    pieces: list[Tensor], parameter: DTensor, compute: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Apply a function of full matrices to N sharded matrices of one shape, divided among the processes. Collective.

    Args:
        pieces: this process's shards of the N matrices.
        parameter: a parameter with the matrices' full shape and sharding.
        compute: stack (n, rows, columns) -> stack of the same shape; n may be 0.

    Returns:
        This process's shards of the N results.
    """
    shape = torch.Size((len(pieces), *parameter.shape))
    strides = (shape[1] * shape[2], shape[2], 1)
    mesh = parameter.device_mesh

    def moved(stack: Tensor, before: int, after: int) -> Tensor:  # reshard from one dimension to another
        cut = DTensor.from_local(stack, mesh, [Shard(before)], run_check=False, shape=shape, stride=strides)
        return cut.redistribute(placements=[Shard(after)]).to_local()

    mine = moved(torch.stack(pieces), 1, 0)  # (n, rows, columns): full matrices
    return moved(compute(mine).contiguous(), 0, 1).unbind()
