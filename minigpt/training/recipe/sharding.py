"""FSDP: each process keeps a part of every tensor and gathers a block's weights while it is used.

This is FSDP2, torch's fully_shard (Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020, arXiv 1910.02054): the
same arithmetic as with a copy in each process, in a fraction of the memory. A piece is a DTensor, which knows the shape
of the whole, its device and the processes that hold the others; it is cut along the rows. Everything here leaves an
ordinary tensor as it is. "Together" marks what all processes must call at the same time.
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

from minigpt.checkpoint.filling import empty_model
from minigpt.checkpoint.saving import state_of
from minigpt.model.gpt import GPT

Loss = Callable[[GPT, Tensor, Tensor], Tensor]


def shard(model: GPT, device: torch.device, loss: Loss, low: torch.dtype | None = None) -> Loss:
    """Cut the model's weights into pieces, in place. Together, with the same weights on every process.

    A block's weights are gathered for its forward, freed, and gathered again for its backward; embedding, final norm
    and unembedding, which a tied model must not part, stay gathered from forward to backward. Gradients are averaged in
    float32 and leave their piece alone on each process.

    Args:
        model: whole, on any device.
        device: where its pieces shall be.
        loss: (model, ids, targets) -> scalar.
        low: what autocast computes matrix products in; blocks then send their weights in it, half the bytes. The
            stream between blocks, and the embedding, stay as they are.

    Returns:
        The loss as a forward of the sharded model: weights are gathered before it.
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
    """No backward follows a forward without gradients, after which the whole weights would be given up."""
    assert isinstance(model, FSDPModule)
    if not torch.is_grad_enabled():
        model.reshard()


def is_sharded(model: GPT) -> bool:
    """Whether the model's weights are in pieces."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The piece that this process has; a view, so that what is done to it in place is done to the piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All pieces of a tensor put together, or a sum over processes that is still owed taken. Together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor laid out as `other` of the same shape is: on its device, and this process's piece of it."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def share_out(tensors: Mapping[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """Whole tensors by parameter name -> laid out as the model's parameters of these names and shapes are."""
    laid_out = dict(tensors)
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].shape == parameter.shape:  # what does not fit, loading will say
            laid_out[name] = like(tensors[name], parameter)
    return laid_out


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole: in main memory of the first process, and {} elsewhere. Together.

    One after the other, so that no device holds more than one whole tensor. Where none is in pieces, as they are.
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
    """A model to sample from: itself where it is whole; else a copy, in the first process's main memory only. Together.

    Returns:
        None on the other processes.
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
    """Work out something that needs whole matrices, for many of one shape: each process takes some of them. Together.

    Args:
        pieces: this process's piece of N matrices.
        parameter: of the matrices' shape, and cut as they are.
        compute: stack (n, rows, columns) -> stack of the same shape; n may be 0.

    Returns:
        This process's pieces of the N results.
    """
    shape = torch.Size((len(pieces), *parameter.shape))
    strides = (shape[1] * shape[2], shape[2], 1)
    mesh = parameter.device_mesh

    def moved(stack: Tensor, before: int, after: int) -> Tensor:  # from pieces along one dimension to another's
        cut = DTensor.from_local(stack, mesh, [Shard(before)], run_check=False, shape=shape, stride=strides)
        return cut.redistribute(placements=[Shard(after)]).to_local()

    mine = moved(torch.stack(pieces), 1, 0)  # (n, rows, columns): whole
    return moved(compute(mine).contiguous(), 0, 1).unbind()
