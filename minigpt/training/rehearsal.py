"""A step that changes nothing, before the first: memory that does not suffice shows before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy

from minigpt.data.batches import Batches, ValidationWindows, validation_windows
from minigpt.errors import MemoryExceeded
from minigpt.evaluation.loss import TOKENS_AT_ONCE, evaluate
from minigpt.training.config import TrainConfig
from minigpt.training.module import TrainingModule


class Rehearsal(pl.Callback):
    """One micro-batch forward and backward, whose gradients are dropped, and one forward of validation.

    It goes the way of a training step, so that a compiled step is compiled here; random numbers, weights, optimizer
    and the other processes do not hear of it. (The optimizer's own state comes with the first step, still before
    anything is written.)
    """

    def __init__(self, config: TrainConfig, batches: Batches, windows: ValidationWindows | None) -> None:
        self.config, self.batches, self.windows = config, batches, windows

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        strategy = trainer.strategy
        alone = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with torch.random.fork_rng(), memory_errors(training_advice(self.config)), alone:
            batch = self.batches.read(trainer.global_step, slice(0, self.config.micro_batch_size))
            loss = strategy.training_step(strategy.batch_to_device(batch), 0)
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        del loss
        for parameter in pl_module.parameters():
            parameter.grad = None
        pl_module.step_loss = None
        if self.windows is None:
            return
        few = validation_windows(self.windows.stream, self.windows.block_size, TOKENS_AT_ONCE)
        byte_lengths = torch.zeros(self.config.model.vocab_size or 0, dtype=torch.int64)
        with memory_errors(VALIDATION_ADVICE), trainer.precision_plugin.forward_context():
            evaluate(pl_module.model, few, byte_lengths)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn what Python and torch raise where memory does not suffice into our error.

    Raises:
        MemoryExceeded: with the advice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise MemoryExceeded(f"out of memory {advice}") from error


def training_advice(config: TrainConfig) -> str:
    """How to take the same step with less memory: smaller micro-batches, more of them."""
    rows, block = config.micro_batch_size, config.model.block_size
    asked = f"with {rows} rows of {block} tokens a forward"
    if rows == 1:
        return (
            f"{asked}; give a smaller --model.block_size or a smaller model, or --trainer.activation_checkpointing true"
        )
    fewer = max(n for n in range(1, rows) if rows % n == 0)
    forwards = config.accumulation * rows // fewer
    return f"{asked}; give --batch.micro_batch_size {fewer}: a step is then {forwards} forwards, with the same result"


VALIDATION_ADVICE = (
    f"in validation ({TOKENS_AT_ONCE} tokens a forward, fewer where the vocabulary is long); free some memory, or "
    f"use a smaller model, --model.block_size or --tokenizer.vocab_size"
)
