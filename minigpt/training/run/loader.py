"""The training loader: an iterable with a length over one process's micro-batches, starting at any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from time import perf_counter

from torch import Tensor

from minigpt.data.batches import Batches
from minigpt.training.config import TrainConfig


class MicroBatches:
    """Iterable over this process's slices of the global batches: (ids, targets), each (micro_batch_size, T) int64.

    Batches are a function of the step, so a loader started at step s continues exactly where an earlier one stopped.

    Attributes:
        waited: seconds spent on reading batches so far.
    """

    def __init__(self, batches: Batches, config: TrainConfig, first_step: int, rank: int = 0) -> None:
        self.batches = batches
        self.config, self.steps = config, range(first_step, config.trainer.max_steps)
        self.accumulation, self.rows = config.accumulation, config.micro_batch_size
        self.first_row = rank * self.accumulation * self.rows
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in self.steps:
            for micro in range(self.accumulation):
                begin = self.first_row + micro * self.rows
                asked = perf_counter()
                batch = self.batches.read(step, slice(begin, begin + self.rows))
                self.waited += perf_counter() - asked
                yield batch


def batch_hash(batches: Batches, step: int) -> str:
    """Hash of global batch `step`: 16 hex digits of the sha256 over its ids, row by row, as 64-bit little-endian.

    It does not depend on the number of processes or micro-batches.
    """
    ids, _ = batches.read(step)  # (rows, T)
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()[:16]
