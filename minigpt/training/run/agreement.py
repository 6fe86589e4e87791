"""One all-reduce per step: the mean losses, and the requests to stop or to save.

Signals set flags; processes agree on the flags after every step, so the current step is always finished.

When `minigpt train` launches several processes, it forwards its signals to them. torchrun forwards SIGTERM and SIGINT,
but SIGUSR1 kills it: send SIGUSR1 to one of its processes instead. torchrun kills processes that are still running 30
seconds after a signal. If a step and a save may take longer, start torchrun with --shutdown_timeout SECONDS (or set
TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
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
    """First callback of a step: averages the losses over all processes and exchanges stop and save requests.

    Both use the same all-reduce. Ctrl-C and SIGTERM finish the step, save a checkpoint and exit; a second Ctrl-C exits
    immediately. SIGUSR1 saves a checkpoint after the step and continues. If any process receives a signal, all
    processes act on it after the same step. A save in progress always finishes, since a handler only records the
    signal.

    Attributes:
        received: the signal that asked this process to stop; 0 for none.
        stopping: agreed: this step is the last.
        save_now: agreed: this step is saved, whatever checkpoint.every says.
        signal: agreed: the signal that asked to stop.
        losses: of the step just done, nats per token, over all processes: "loss", then every added loss by name.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stopping = self.save_now = False
        self.signal = 0
        self.losses: dict[str, float] = {}
        self._saves_asked = self._saves_agreed = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context manager: inside the `with` block, signals are recorded and do not end the process."""
        try:
            before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        except ValueError:  # not in the main thread: the caller handles signals
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
        # Under torchrun one Ctrl-C may arrive twice: from the terminal and from torchrun.
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        if number == signal.SIGINT and self.received == signal.SIGINT and alone:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = number

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        assert module.step_losses is not None
        asked = self._saves_asked  # a later signal counts for the next step
        flags = [self.received == signal.SIGINT, self.received == signal.SIGTERM, asked > self._saves_agreed]
        mine = torch.cat([module.step_losses.cpu().double(), torch.tensor(flags, dtype=torch.float64)])
        *losses, interrupted, terminated, save = sum_over_processes(mine).tolist()
        self._saves_agreed = asked
        self.losses = {
            name: loss / trainer.world_size for name, loss in zip(module.objective.names, losses, strict=True)
        }
        self.save_now = save > 0
        if interrupted or terminated:
            self.stopping = trainer.should_stop = True
            self.signal = signal.SIGTERM if terminated else signal.SIGINT
        if trainer.is_global_zero and (self.stopping or self.save_now):
            notice(
                f"stopping after step {step}, saving first" if self.stopping else f"step {step}: saving, as requested"
            )

    def raise_if_stopped(self, resume_hint: str) -> None:
        """Raise Interrupted with the signal's exit code if training was stopped by a signal."""
        if self.stopping:
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}; {resume_hint}", 128 + self.signal)
