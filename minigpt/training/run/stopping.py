"""Signals set flags; processes agree on the flags once per step, and the current step is finished.

Several processes that `minigpt train` starts hear what their launcher hears. torchrun passes on SIGTERM and SIGINT, but
dies of SIGUSR1: send that to one of its processes. torchrun kills what has not left 30 seconds after a signal; where a
step and a save may take longer, start it with --shutdown_timeout SECONDS (or TORCH_ELASTIC_SHUTDOWN_TIMEOUT set).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning.pytorch as pl
import torch

from minigpt.errors import Interrupted
from minigpt.terminal import notice
from minigpt.training.recipe.reduction import sum_over_processes
from minigpt.training.run.each_step import EachStep
from minigpt.training.run.module import TrainingModule

SAVE_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, SAVE_SIGNAL) if number is not None]


class Agreement(EachStep):
    """First of the callbacks: averages the step's loss over all processes and learns, in the same reduction, whether
    any of them was asked to stop or to save.

    Ctrl-C and SIGTERM finish the step, save and leave; a second Ctrl-C leaves at once. SIGUSR1 saves after the step and
    goes on. One process of several is enough to hear of it: all of them act on the same step. A save in progress is
    always finished first, since a handler does no more than note the signal.

    Attributes:
        received: the signal that asked this process to stop; 0 for none.
        stopping: agreed: this step is the last.
        save_now: agreed: this step is saved, whatever checkpoint.every says.
        signal: agreed: the signal that asked to stop.
        loss: of the step just done, nats per token, over all processes.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stopping = self.save_now = False
        self.signal = 0
        self.loss = float("nan")
        self._saves_asked = self._saves_agreed = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For the length of a `with` block, signals are noted instead of ending the process."""
        try:
            before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self._saves_asked += 1
            return
        # Under torchrun one Ctrl-C may arrive twice: from the terminal, and passed on.
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        if number == signal.SIGINT and self.received == signal.SIGINT and alone:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = number

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        assert module.step_loss is not None
        asked = self._saves_asked  # a signal from here on counts for the next step
        flags = [self.received == signal.SIGINT, self.received == signal.SIGTERM, asked > self._saves_agreed]
        mine = torch.stack([module.step_loss.cpu().double(), *torch.tensor(flags, dtype=torch.float64)])
        loss, interrupted, terminated, save = sum_over_processes(mine).tolist()
        self._saves_agreed = asked
        self.loss = loss / trainer.world_size
        self.save_now = save > 0
        if interrupted or terminated:
            self.stopping = trainer.should_stop = True
            self.signal = signal.SIGTERM if terminated else signal.SIGINT
        if trainer.is_global_zero and (self.stopping or self.save_now):
            notice(f"stopping after step {step}, saving first" if self.stopping else f"step {step}: saving, as asked")

    def raise_if_stopped(self, resume_hint: str) -> None:
        """After the fit: turn an agreed stop into the error that carries its exit code."""
        if self.stopping:
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}; {resume_hint}", 128 + self.signal)
