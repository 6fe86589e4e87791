"""Snapshots of the internals during training, as rows of metrics.jsonl.

    internals/induction/L1H0    for example; see minigpt.internals.dynamics.snapshot for all kinds

Snapshots use the evaluated weights and fixed tokens of the validation split. They do not affect training's data or
random numbers: a run with snapshots is bit-identical to a run without.
"""

from __future__ import annotations

import math
import time

import lightning.pytorch as pl
from torch import Tensor

from minigpt.internals.access.access import Access
from minigpt.internals.dynamics.snapshot import numbers, snapshot
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.sharding import plain
from minigpt.training.run.each_step import EachStep, due
from minigpt.training.run.metrics import Metrics
from minigpt.training.run.module import TrainingModule


def due_by_doublings(step: int, last: int) -> bool:
    """Whether a step is one of 0, 1, 2, 3, 4, 6, 8, 11, 16, ... (two per doubling), or the last.

    The steps do not depend on the length of the run: there are twenty up to step 1000, and seven more up to 10000.
    """
    half_doublings = round(2 * math.log2(step)) if step else 0
    return step in (0, last) or step == round(2 ** (half_doublings / 2))


class Internals(EachStep):
    """Callback that takes snapshots before the first step, every `internals.every` steps and at the end.

    It runs before the callback that saves, so that the row of a checkpoint is always written.

    Args:
        text: token ids (B, T) to measure on.
    """

    def __init__(self, config: TrainConfig, text: Tensor, metrics: Metrics) -> None:
        self.config, self.text, self.metrics = config, text, metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, 0)

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        every, last = self.config.internals.every, self.config.trainer.max_steps
        if due_by_doublings(step, last) if every == "log" else due(step, every, last):
            self._measure(trainer, module, step)

    def _measure(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        began = time.monotonic()
        row: dict[str, float] = {}
        with module.evaluated_weights():
            model = plain(module.model)  # collective: all processes send their shards
            if trainer.is_global_zero and model is not None:
                row = numbers(snapshot(Access.of(model), self.text))
        self.metrics.pause("internals", time.monotonic() - began)
        self.metrics.write(trainer, step, row)
