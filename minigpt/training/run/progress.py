"""All uses of Lightning's private attributes (written for lightning 2.6.6; a test checks that they exist)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.profilers import PassThroughProfiler


class LightModule(pl.LightningModule):
    """A LightningModule with less overhead per hook.

    Lightning sets the name of the current hook on the module about fifty times per step. torch's nn.Module.__setattr__,
    which checks for parameters first, makes this a fifth of Lightning's overhead per step.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class NoProfiler(PassThroughProfiler):
    """A profiler without overhead: Lightning's own no-op profiler creates a generator about fifty times per step."""

    nothing: AbstractContextManager[None] = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing


def set_progress(trainer: pl.Trainer, step: int) -> None:
    """Set the number of finished optimizer steps of a new trainer.

    `trainer.global_step` then starts at `step`, and `max_steps` is the total of the whole run.
    """
    total = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    total.ready = total.completed = step


def without_signals(trainer: pl.Trainer) -> None:
    """Disable Lightning's signal handlers and its broadcast of SIGTERM before every micro-batch.

    Lightning's handler communicates with the other processes and ends a run with exit code 0. The callback in
    stopping.py only records a signal; processes agree on stopping once per step, in the all-reduce of the loss.
    """
    loop, signals = trainer.fit_loop.epoch_loop, trainer._signal_connector
    for owner, name in ((loop, "_broadcast_sigterm_tensor"), (signals, "register_signal_handlers")):
        if not callable(getattr(owner, name, None)):
            raise AttributeError(f"lightning's {type(owner).__name__} has no {name}; minigpt needs lightning 2.6")
        setattr(owner, name, lambda: None)
