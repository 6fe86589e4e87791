"""The training step as a LightningModule: next-token cross-entropy, one gradient norm, one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import NonFiniteError, NotLearning
from minigpt.model.gpt import GPT
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.average import Average
from minigpt.training.recipe.health import Idle, mean_loss, remedy
from minigpt.training.recipe.loss import Objective, Terms, compiled
from minigpt.training.recipe.optimizer import make_optimizer
from minigpt.training.recipe.schedule import learning_rate
from minigpt.training.recipe.sharding import whole
from minigpt.training.recipe.strategy import recompute_blocks, share
from minigpt.training.run.progress import LightModule

UNUSABLE_STEPS = 5  # a run stops after this many steps in a row without a usable gradient


def mix_seed(*parts: int) -> int:
    """Hash several numbers to one 63-bit seed (splitmix64's finalizer)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class TrainingModule(LightModule):
    """A GPT with its loss and optimizer.

    The module has no extra state to checkpoint: the learning rate depends only on the step, and dropout's random
    numbers only on (seed, step, micro-batch, rank).
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = config
        self.objective = Objective.of(config.losses)
        self.compute_loss: Callable[[GPT, Tensor, Tensor], Terms] = self.objective
        if config.trainer.compile:
            self.compute_loss = compiled(self.objective)
        if config.trainer.activation_checkpointing:
            recompute_blocks(model)
        self.step_losses: Tensor | None = None  # (1 + n) means over the step's micro-batches so far, as a running sum
        self.gradient_norm: Tensor | None = None
        self.unusable_steps = 0
        self.idle = Idle()
        decay = config.optimizer.ema_decay
        self.average = Average(model, decay) if decay else None  # created again when weights are loaded

    def configure_model(self) -> None:
        """Shard the weights if the strategy is fsdp. Lightning calls this after the process group exists."""
        loss = share(self.model, self.settings, self.trainer.strategy.root_device, self.objective)
        if loss is not None:
            self.compute_loss = loss
            self.average = Average(self.model, self.average.decay) if self.average else None

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Context manager: the model has the weights to validate, save and sample (averaged ones if enabled)."""
        return self.average.swapped() if self.average else nullcontext()

    @property
    def step_learning_rate(self) -> float:
        """The learning rate of the step in progress."""
        return learning_rate(self.settings.optimizer, self.trainer.global_step, self.settings.trainer.max_steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Newton-Schulz needs no more precision than the other matrix products: it is in bfloat16 if they are.
        narrow = self.settings.trainer.precision == "bf16-mixed"
        return make_optimizer(self.model, self.settings.optimizer, torch.bfloat16 if narrow else torch.float32)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        ids, targets = batch  # (B, T), (B, T)
        accumulation = self.settings.accumulation
        micro = batch_index % accumulation
        if self.model.config.dropout or self.model.config.attn_dropout:
            torch.manual_seed(mix_seed(self.settings.seed, self.trainer.global_step, micro, self.global_rank))
        losses = self.compute_loss(self.model, ids, targets)
        part = losses.means / accumulation
        self.step_losses = part if micro == 0 or self.step_losses is None else self.step_losses + part
        return losses.total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.step_learning_rate
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        if self.average:
            self.average.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Compute the gradient norm once, clip to the limit, and skip a step whose norm is not finite.

        The gradients are already averaged over all processes, so every process makes the same decision.
        """
        limit = self.settings.trainer.gradient_clip_val or float("inf")
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        self.gradient_norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, self.gradient_norm)
        assert self.step_losses is not None
        loss = self.step_losses[0]
        norm, step = float(self.gradient_norm), self.trainer.global_step + 1
        if math.isfinite(norm):
            self.idle.look(self.model, loss)
            if norm or not mean_loss(loss):  # with a loss of exactly zero, a zero gradient is correct
                self.unusable_steps = 0
                return
        self.unusable_steps += 1
        if not norm:
            if self.unusable_steps >= UNUSABLE_STEPS:
                raise NotLearning(
                    f"step {step}: the gradient of every parameter was exactly zero {UNUSABLE_STEPS} steps in a row, "
                    f"though the loss is {float(loss):.4f}; {remedy()}"
                )
            return
        for parameter in self.model.parameters():
            parameter.grad = None  # the optimizer skips it: neither weights nor optimizer state change
        if self.unusable_steps >= UNUSABLE_STEPS:
            raise NonFiniteError(
                f"step {step}: loss or gradient was NaN or infinite {UNUSABLE_STEPS} steps in a row; the weights did "
                f"not change. Lower optimizer.learning_rate or raise optimizer.warmup_steps, and resume"
            )
        if self.global_rank == 0:
            notice(f"step {step}: the gradient is NaN or infinite; this step is skipped")
