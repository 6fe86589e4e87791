"""FSDP: each process keeps a part of every tensor and gathers a block's weights while it is used.

This is FSDP2, torch's fully_shard (Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020, arXiv 1910.02054): the
same arithmetic as with a full copy in each process, with a fraction of the memory. A shard is a DTensor, which knows
the full shape, its device and the other processes; tensors are sharded along their rows. All functions here return
ordinary tensors unchanged. "Collective" marks functions that all processes must call at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

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

from minigpt.checkpoint.filling import empty_model
from minigpt.checkpoint.saving import state_of
from minigpt.model.gpt import GPT

Loss = Callable[[GPT, Tensor, Tensor], Any]


def shard(model: GPT, device: torch.device, loss: Loss, low: torch.dtype | None = None) -> Loss:
    """Shard the model's weights in place. Collective; all processes must have the same weights.

    A block's weights are gathered for its forward pass, freed, and gathered again for its backward pass. Embedding,
    final norm and unembedding stay gathered from forward to backward, since a tied model shares their weights.
    Gradients are averaged in float32, and each process keeps only its shard of them.

    Args:
        model: a model with full weights, on any device.
        device: device of the shards.
        loss: (model, ids, targets) -> losses (see loss.Objective).
        low: autocast's dtype for matrix products. Blocks then communicate their weights in it, which halves the bytes.
            The activations between blocks and the embedding keep their dtype.

    Returns:
        The loss as a forward pass of the sharded model, which gathers weights first.
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
    """Free the gathered weights after a forward pass without gradients, since no backward pass will free them."""
    assert isinstance(model, FSDPModule)
    if not torch.is_grad_enabled():
        model.reshard()


def is_sharded(model: GPT) -> bool:
    """Whether the model's weights are sharded."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor on this process, as a view: in-place operations change the shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor: gathers shards, and completes a pending sum over processes. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor on the device of `other` (of the same shape), sharded in the same way."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def share_out(tensors: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """Move and shard full tensors, given by parameter name, like the model's parameters of the same name and shape."""
    laid_out = dict(tensors)
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].shape == parameter.shape:  # loading reports a mismatch
            laid_out[name] = like(tensors[name], parameter)
    return laid_out


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors into main memory of process 0; the other processes get {}. Collective.

    Tensors are gathered one by one, so that no device holds more than one full tensor. If none is sharded, all
    processes get the tensors unchanged.
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
    """A model for sampling: the model itself if it is not sharded, else a copy on the CPU of process 0. Collective.

    Returns:
        The model; None on the other processes if it is sharded.
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
    """Apply a function that needs full matrices to N sharded matrices of one shape. Collective.

    Each process computes some of the matrices.

    Args:
        pieces: this process's shards of N matrices.
        parameter: a parameter with the shape and sharding of the matrices.
        compute: stack (n, rows, columns) -> stack of the same shape; n may be 0.

    Returns:
        This process's shards of the N results.
    """
    shape = torch.Size((len(pieces), *parameter.shape))
    strides = (shape[1] * shape[2], shape[2], 1)
    mesh = parameter.device_mesh

    def moved(stack: Tensor, before: int, after: int) -> Tensor:  # from sharding along one dimension to another
        cut = DTensor.from_local(stack, mesh, [Shard(before)], run_check=False, shape=shape, stride=strides)
        return cut.redistribute(placements=[Shard(after)]).to_local()

    mine = moved(torch.stack(pieces), 1, 0)  # (n, rows, columns): full matrices
    return moved(compute(mine).contiguous(), 0, 1).unbind()
