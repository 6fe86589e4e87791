"""The one place that touches Lightning's private attributes (written against lightning 2.6.6; a test watches them)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler


class LightModule(pl.LightningModule):
    """A LightningModule whose hooks cost less.

    Lightning notes each hook's name on the module, before and after, some fifty times a step; torch's way of setting a
    module's attribute, which looks for parameters first, makes that a fifth of all that Lightning adds to a step.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class NoProfiler(PassThroughProfiler):
    """Measures nothing, without a generator for each of the fifty places in a step that Lightning would measure."""

    nothing: AbstractContextManager[None] = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing


def set_progress(trainer: pl.Trainer, step: int) -> None:
    """Tell a fresh trainer that `step` optimizer steps are already done.

    `trainer.global_step` then counts on from there, and `max_steps` is the total of the whole run.
    """
    total = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    total.ready = total.completed = step


def without_signal_broadcast(trainer: pl.Trainer) -> None:
    """Drop the broadcast that Lightning makes before every micro-batch to learn of a SIGTERM.

    Our own callback agrees on stopping once a step, in the reduction that the loss needs anyway.
    """
    loop = trainer.fit_loop.epoch_loop
    if not callable(getattr(loop, "_broadcast_sigterm_tensor", None)):
        raise AttributeError("lightning's training loop has no _broadcast_sigterm_tensor; minigpt needs lightning 2.6")
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
