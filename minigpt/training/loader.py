"""The training loader: a plain sized iterable over one process's micro-batches, from any step on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from minigpt.data.batches import Batches
from minigpt.training.config import TrainConfig


class MicroBatches:
    """Yields (ids, targets), each (micro_batch_size, T) int64: the slice of every global batch that is this process's.

    The batches follow from the step alone, so a loader that begins at step s gives what one that ran up to there would.
    """

    def __init__(self, batches: Batches, config: TrainConfig, first_step: int, rank: int = 0) -> None:
        self.batches = batches
        self.steps = range(first_step, config.trainer.max_steps)
        self.accumulation, self.rows = config.accumulation, config.micro_batch_size
        self.first_row = rank * self.accumulation * self.rows

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in self.steps:
            for micro in range(self.accumulation):
                begin = self.first_row + micro * self.rows
                yield self.batches.read(step, slice(begin, begin + self.rows))
