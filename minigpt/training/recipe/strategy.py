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
from minigpt.training.recipe.loss import next_token_loss
from minigpt.training.recipe.sharding import Loss, is_sharded, shard


def make_strategy(config: TrainConfig) -> Strategy | str:
    """What Lightning's Trainer is given as its strategy.

    One process alone has nothing to share; it trains without any, whatever the config says.
    """
    if config.processes == 1:
        return "auto"
    if config.trainer.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=config.processes, tensor_parallel_size=1)
    return DDPStrategy(gradient_as_bucket_view=True)


def recompute_blocks(model: GPT) -> None:
    """Keep of each block only its input for the backward pass, and compute the rest again (Chen et al. 2016, arXiv
    1604.06174).

    Dropout draws the same numbers the second time. Names of parameters, and what the model computes, stay as they are;
    a forward without gradients is not touched.
    """
    preserve = bool(model.config.dropout or model.config.attn_dropout)
    for block in model.trunk.blocks:
        block.forward = partial(_recomputed, block.forward, preserve)


def _recomputed(forward: Callable[..., Tensor], preserve_rng_state: bool, *arguments: object) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def share(model: GPT, config: TrainConfig, device: torch.device) -> Loss | None:
    """Cut the model's weights into pieces where the config says so and there are several processes. Together.

    Returns:
        The loss to train with from then on; None where the model stays as it is.
    """
    if config.trainer.strategy != "fsdp" or config.processes == 1 or is_sharded(model):
        return None
    if config.trainer.compile and compiler_works(device):  # blocks one by one: gathering goes on between them
        for block in model.trunk.blocks:
            block.compile(dynamic=False)
    # On a CPU, layer_norm takes no bfloat16 weights beside a float32 stream; sending them there costs little anyway.
    low = torch.bfloat16 if config.trainer.precision == "bf16-mixed" and device.type != "cpu" else None
    return shard(model, device, next_token_loss, low)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile does anything here; where not, a line says so."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, or one that is broken: both come as many types
        notice(f"torch.compile does not work here ({type(error).__name__}); training goes on uncompiled")
        return False
    return True
