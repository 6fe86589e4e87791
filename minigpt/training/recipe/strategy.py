"""DDP and FSDP strategies, and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minigpt.model.gpt import GPT
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.sharding import Loss, is_sharded, shard


def make_strategy(config: TrainConfig) -> Strategy | str:
    """The strategy for Lightning's Trainer; "auto" (none) for a single process, whatever the config says."""
    if config.processes == 1:
        return "auto"
    if config.trainer.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=config.processes, tensor_parallel_size=1)
    return DDPStrategy(gradient_as_bucket_view=True)


def recompute_blocks(model: GPT) -> None:
    """Activation checkpointing: store only each block's input and recompute the rest in the backward pass (Chen et al.
    2016, arXiv 1604.06174).

    The recomputation uses the same dropout masks. Parameter names and the model's output do not change; a forward pass
    without gradients is not affected.
    """
    preserve = bool(model.config.dropout or model.config.attn_dropout)
    for block in model.trunk.blocks:
        block.forward = partial(_recomputed, block.forward, preserve)


def _recomputed(forward: Callable[..., Tensor], preserve_rng_state: bool, *arguments: object) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def share(model: GPT, config: TrainConfig, device: torch.device, loss: Loss) -> Loss | None:
    """Shard the model's weights with FSDP if the config asks for it and there are several processes. Collective.

    Returns:
        The loss to train with from then on; None if the model is not sharded.
    """
    if config.trainer.strategy != "fsdp" or config.processes == 1 or is_sharded(model):
        return None
    if config.trainer.compile and compiler_works(device):  # compile block by block, as FSDP gathers weights in between
        for block in model.trunk.blocks:
            block.compile(dynamic=False)
    # On a CPU, layer_norm rejects bfloat16 weights with float32 activations; communication is cheap there anyway.
    low = torch.bfloat16 if config.trainer.precision == "bf16-mixed" and device.type != "cpu" else None
    return shard(model, device, loss, low)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works here; if not, shows a notice."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing or broken compiler: many exception types
        notice(f"torch.compile does not work here ({type(error).__name__}); training continues uncompiled")
        return False
    return True
