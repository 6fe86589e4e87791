"""Stopping when told to: a signal sets a flag, processes agree on it once a step, the step in progress is finished."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from minigpt.errors import Interrupted
from minigpt.terminal import notice
from minigpt.training.each_step import EachStep, sum_over_processes
from minigpt.training.module import TrainingModule


class Agreement(EachStep):
    """First of the callbacks: averages the step's loss over all processes and learns, in the same reduction, whether
    any of them was asked to stop.

    Ctrl-C and SIGTERM finish the step, save and leave; a second Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number, on the process that received it
        self.stopping = False  # agreed: this step is the last
        self.signal = 0  # agreed: the signal that asked for it
        self.loss = float("nan")  # of the step just done, nats a token, over all processes
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: until here Lightning would put handlers of its own over ours.
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            pass

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Under the elastic launcher one Ctrl-C may arrive twice: from the terminal, and passed on by the launcher.
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        if number == signal.SIGINT and self.received == signal.SIGINT and alone:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = number

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        assert module.step_loss is not None
        flags = torch.stack(
            [
                module.step_loss.cpu().double(),
                torch.tensor(float(self.received == signal.SIGINT), dtype=torch.float64),
                torch.tensor(float(self.received == signal.SIGTERM), dtype=torch.float64),
            ]
        )
        loss, interrupted, terminated = sum_over_processes(flags).tolist()
        self.loss = loss / trainer.world_size
        if interrupted or terminated:
            self.stopping = trainer.should_stop = True
            self.signal = signal.SIGTERM if terminated else signal.SIGINT
            if trainer.is_global_zero:
                notice(f"stopping after step {step}, saving first")

    def raise_if_stopped(self, resume_hint: str) -> None:
        """After the fit: turn an agreed stop into the error that carries its exit code."""
        if self.stopping:
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}; {resume_hint}", 128 + self.signal)
