"""Shared by callbacks: a hook that runs once per step, and the test whether something is due."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from minigpt.training.run.module import TrainingModule


class EachStep(pl.Callback):
    """A callback with an `on_step_end` hook per optimizer step (not per micro-batch); steps count from 1."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Called after optimizer step `step`, with the updated weights."""


def due(step: int, every: int, last: int) -> bool:
    """Whether an event is due at this step: at multiples of `every` (0: none) and at the last step."""
    return step == last or (every > 0 and step % every == 0)
