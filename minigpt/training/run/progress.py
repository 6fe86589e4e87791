"""All uses of Lightning's private attributes (written for lightning 2.6.6; a test watches them)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler


class LightModule(pl.LightningModule):
    """A LightningModule with less overhead per hook.

    Lightning stores each hook's name on the module, before and after it, about fifty times per step. nn.Module's
    __setattr__, which looks for parameters first, makes that a fifth of Lightning's overhead per step.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class NoProfiler(PassThroughProfiler):
    """A profiler that measures nothing and creates no generator at the about fifty profiled places per step."""

    nothing: AbstractContextManager[None] = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing


def set_progress(trainer: pl.Trainer, step: int) -> None:
    """Set a new trainer's `global_step` to `step`, so that `max_steps` counts the steps of the whole run."""
    total = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    total.ready = total.completed = step


def without_signals(trainer: pl.Trainer) -> None:
    """Disable Lightning's signal handlers, and its broadcast about SIGTERM before every micro-batch.

    Its handler talks to the other processes and ends a run with exit code 0. Our own callback only notes a signal, and
    agrees on stopping once per step, in the reduction that the loss needs anyway.
    """
    loop, signals = trainer.fit_loop.epoch_loop, trainer._signal_connector
    for owner, name in ((loop, "_broadcast_sigterm_tensor"), (signals, "register_signal_handlers")):
        if not callable(getattr(owner, name, None)):
            raise AttributeError(f"lightning's {type(owner).__name__} has no {name}; minigpt needs lightning 2.6")
        setattr(owner, name, lambda: None)
