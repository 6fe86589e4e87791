"""A trial step before training that changes nothing: it finds out-of-memory errors and a model that cannot learn before
anything is written.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from minigpt.data.batches import Batches, ValidationWindows, validation_windows
from minigpt.errors import MemoryExceeded
from minigpt.evaluation.loss import TOKENS_AT_ONCE, evaluate
from minigpt.model.device import memory_errors
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.health import TOLERANCES, check_compiled, check_gradients, mean_loss
from minigpt.training.run.metrics import Metrics
from minigpt.training.run.module import TrainingModule


class Rehearsal(pl.Callback):
    """Runs forward and backward of one micro-batch, drops the gradients, and runs one forward pass of validation.

    It uses the code of a training step, so a compiled step is compiled here and compared with the uncompiled one.
    Random numbers, weights and optimizer do not change. (The optimizer allocates its state in the first step, which is
    still before anything is written.)
    """

    def __init__(
        self, config: TrainConfig, batches: Batches, windows: ValidationWindows | None, metrics: Metrics
    ) -> None:
        self.config, self.batches, self.windows, self.metrics = config, batches, windows, metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        began = time.monotonic()
        self._rehearse(trainer, pl_module)
        self.metrics.pause("rehearsal", time.monotonic() - began)

    def _rehearse(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:
        strategy = trainer.strategy
        alone = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with torch.random.fork_rng(), memory_errors(training_advice(self.config)), alone:
            batch = self.batches.read(trainer.global_step, slice(0, self.config.micro_batch_size))
            batch = strategy.batch_to_device(batch)
            loss = self._forward(strategy, *batch)
            loss.backward()
            finite = math.isfinite(mean_loss(loss))  # if not, the first step reports it
            if finite and (not self.config.trainer.compile or self._compare(pl_module, strategy, batch, loss)):
                check_gradients(pl_module.model, loss)
        del loss
        for parameter in pl_module.parameters():
            parameter.grad = None
        pl_module.step_losses = None
        if self.windows is None:
            return
        few = validation_windows(self.windows.stream, self.windows.block_size, TOKENS_AT_ONCE)
        byte_lengths = torch.zeros(self.config.model.vocab_size or 0, dtype=torch.int64)
        with memory_errors(VALIDATION_ADVICE), trainer.precision_plugin.forward_context():
            evaluate(pl_module.model, few, byte_lengths)

    def _compare(self, module: TrainingModule, strategy: Strategy, batch: Any, loss: torch.Tensor) -> bool:
        """Compare the compiled step with the uncompiled one, unless memory is too small for the comparison.

        Returns:
            Whether they were compared. If not, the gradients are lost; the first steps will detect zero gradients.
        """
        drops = self.config.model.dropout or self.config.model.attn_dropout
        tolerance = None if drops else TOLERANCES[self.config.trainer.precision]
        try:
            with memory_errors("in the comparison with the eager step"):
                check_compiled(module.model, partial(self._forward, strategy), batch, loss, tolerance)
        except MemoryExceeded:
            notice("the compiled step was not compared with the uncompiled one: not enough memory for the comparison")
            return False
        return True

    @staticmethod
    def _forward(strategy: Strategy, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = strategy.training_step((ids, targets), 0)
        assert isinstance(loss, torch.Tensor)
        return loss


def training_advice(config: TrainConfig) -> str:
    """Advice on how to run the same step with less memory: smaller micro-batches and more gradient accumulation."""
    rows, block = config.micro_batch_size, config.model.block_size
    asked = f"with {rows} rows of {block} tokens per forward"
    if rows == 1:
        return f"{asked}; use a smaller --model.block_size, a smaller model, or --trainer.activation_checkpointing true"
    fewer = max(n for n in range(1, rows) if rows % n == 0)
    forwards = config.accumulation * rows // fewer
    return f"{asked}; give --batch.micro_batch_size {fewer}: {forwards} forward passes per step, with the same result"


VALIDATION_ADVICE = (
    f"in validation ({TOKENS_AT_ONCE} tokens per forward, fewer where the vocabulary is long); free some memory, or "
    f"use a smaller model, --model.block_size or --tokenizer.vocab_size"
)
