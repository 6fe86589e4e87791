"""Parallelism over several processes (ddp, fsdp) and activation checkpointing."""

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
from minigpt.training.recipe.loss import next_token_loss
from minigpt.training.recipe.sharding import Loss, is_sharded, shard


def make_strategy(config: TrainConfig) -> Strategy | str:
    """Return the strategy for Lightning's Trainer. A single process always gets "auto"."""
    if config.processes == 1:
        return "auto"
    if config.trainer.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=config.processes, tensor_parallel_size=1)
    return DDPStrategy(gradient_as_bucket_view=True)


def recompute_blocks(model: GPT) -> None:
    """Enable activation checkpointing for every block (Chen et al. 2016, arXiv 1604.06174).

    Each block keeps only its input for the backward pass and recomputes the rest, with the same dropout mask. Parameter
    names and results do not change. Forward passes without gradients are unaffected.
    """
    preserve = bool(model.config.dropout or model.config.attn_dropout)
    for block in model.trunk.blocks:
        block.forward = partial(_recomputed, block.forward, preserve)


def _recomputed(forward: Callable[..., Tensor], preserve_rng_state: bool, *arguments: object) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def share(model: GPT, config: TrainConfig, device: torch.device) -> Loss | None:
    """Shard the model if the strategy is fsdp and there are several processes. Collective: all processes must call it.

    Returns:
        The loss function of the sharded model; None if the model is not sharded.
    """
    if config.trainer.strategy != "fsdp" or config.processes == 1 or is_sharded(model):
        return None
    if config.trainer.compile and compiler_works(device):  # per block: weights are gathered between blocks
        for block in model.trunk.blocks:
            block.compile(dynamic=False)
    # On a CPU, layer_norm does not accept bfloat16 weights with float32 input, and communication is cheap anyway.
    low = torch.bfloat16 if config.trainer.precision == "bf16-mixed" and device.type != "cpu" else None
    return shard(model, device, next_token_loss, low)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works on this device; prints a notice if it does not."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, or a broken one: torch raises various types
        notice(f"torch.compile does not work here ({type(error).__name__}); training falls back to eager")
        return False
    return True
