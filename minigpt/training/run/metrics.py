"""Metrics: rows of metrics.jsonl, the progress bar, and the logger.

A training row has train/loss (the cross-entropy), train/NAME for every added loss (without its weight), lr and
grad_norm, and, since the previous row:
    tokens_per_second   over all processes, excluding validation, saves and samples
    mfu                 model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311): the model's FLOPs for those
                        tokens divided by the devices' peak; null if the peak is unknown
    data_wait           fraction of that time that this process waited for batches
    memory              peak memory so far in bytes: of tensors on the GPU, or resident memory of process 0
    batch               hash of the step's global batch, independent of the number of processes
The last row of a session has times in seconds: time/step (median step), time/rehearsal (checks before the first step,
including compilation), time/validation, time/save and time/sample (totals), time/internals if snapshots are enabled,
and time/training (total).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from minigpt.checkpoint.runs import read_metrics
from minigpt.durable import disk_errors, write_text
from minigpt.model.cost import cost_of
from minigpt.terminal import Progress, notice, progress, readable
from minigpt.training.config import TrainConfig
from minigpt.training.plan.hardware import peak_flops, peak_memory
from minigpt.training.recipe.reduction import sum_over_processes
from minigpt.training.run.agreement import Agreement
from minigpt.training.run.each_step import EachStep, due
from minigpt.training.run.loader import MicroBatches, batch_hash
from minigpt.training.run.module import TrainingModule


def rewind_metrics(path: Path, step: int) -> None:
    """Move the rows after `step` to metrics-past-STEP.jsonl, since the resumed run writes them again."""
    rows = read_metrics(path)
    past = [row for row in rows if row["step"] > step]
    if not path.is_file() or (not past and path.read_text(encoding="utf-8").endswith("\n")):
        return
    with disk_errors(str(path)):
        if past:
            aside = path.with_name(f"metrics-past-{step:08d}.jsonl")
            with open(aside, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in past)
                file.flush()
                os.fsync(file.fileno())
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


class Metrics(EachStep):
    """Writes a row every log_every_n_steps, updates the progress bar, and passes rows to Lightning's loggers.

    Only process 0 writes. If a logger fails, one notice says so and the logger is not used again; metrics.jsonl is
    always written.
    """

    def __init__(
        self, run: Path, config: TrainConfig, loader: MicroBatches, agreement: Agreement, start_step: int
    ) -> None:
        self.path = run / "metrics.jsonl"
        self.config, self.loader, self.agreement, self.start_step = config, loader, agreement, start_step
        self.step_flops = cost_of(config.model).training_flops * config.batch.tokens
        self.peak = float("nan")  # FLOPs per second of all devices
        self.seconds_before = 0.0  # spent by earlier sessions of this run
        self.began = self.mark = time.monotonic()
        self.mark_step, self.mark_waited = start_step, 0.0
        self.paused = 0.0  # since the mark: validation, samples and saves, which are no part of the training rate
        self.pauses: dict[str, float] = {}  # all of them in this session, by what they were for
        self.paces: list[float] = []  # seconds per step, of each row
        self.text = ""
        self._file: Any = None
        self._bar: Progress | None = None
        self._bar_context: AbstractContextManager[Progress] | None = None
        self._logger_failed = False

    def seconds(self) -> float:
        """Wall-clock seconds of training so far, including earlier sessions."""
        return self.seconds_before + time.monotonic() - self.began

    def pause(self, what: str, seconds: float) -> None:
        """Record time spent on "rehearsal", "validation" and the like, which does not count for the training rate."""
        self.paused += seconds
        self.pauses[what] = self.pauses.get(what, 0.0) + seconds

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peak = peak_flops(pl_module.device, self.config.trainer.precision)
        self.peak = float(sum_over_processes(torch.tensor(peak, dtype=torch.float64)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self.mark = time.monotonic()
        self.paused = 0.0
        total = self.config.trainer.max_steps
        self._bar_context = progress("training", total, "steps", start=self.start_step, show=trainer.is_global_zero)
        self._bar = self._bar_context.__enter__()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = statistics.median(self.paces[1:] or self.paces or [float("nan")])  # the first row includes warm-up
        spent = {"step": step, "validation": 0.0, "save": 0.0, "sample": 0.0, **self.pauses}
        spent["training"] = time.monotonic() - self.began
        self.write(trainer, trainer.global_step, {f"time/{what}": round(s, 6) for what, s in spent.items()})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar_context is not None:
            self._bar_context.__exit__(None, None, None)
            self._bar_context = self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if due(step, self.config.trainer.log_every_n_steps, self.config.trainer.max_steps):
            self._row(trainer, module, step)
        if self._bar is not None:
            self._bar.update(step, self.text)

    def _row(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        now, waited, steps = time.monotonic(), self.loader.waited, step - self.mark_step
        seconds = max(now - self.mark - self.paused, 1e-9)
        self.paces.append(seconds / steps)
        rate = steps * self.config.batch.tokens / seconds
        mfu, wait = self.step_flops * steps / seconds / self.peak, (waited - self.mark_waited) / seconds
        memory = peak_memory(module.device)
        self.mark, self.mark_step, self.mark_waited, self.paused = now, step, waited, 0.0
        if not trainer.is_global_zero:
            return
        self.text = f"loss {self.agreement.losses['loss']:.3f}  {readable(rate)} tokens/s"
        if math.isfinite(mfu):
            self.text += f"  {mfu:.0%} of peak"
        if wait > 0.02:
            self.text += f"  {wait:.0%} waiting for data"
        if memory:
            self.text += f"  {readable(memory)}B"
        row = {
            **{f"train/{name}": loss for name, loss in self.agreement.losses.items()},
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(module.gradient_norm) if module.gradient_norm is not None else float("nan"),
            "tokens_per_second": round(rate, 1),
            "mfu": round(mfu, 4),
            "data_wait": round(wait, 4),
            "memory": memory,
            "epoch": round(self.loader.batches.epoch(step), 4),
            "batch": batch_hash(self.loader.batches, step - 1),
        }
        self.write(trainer, step, row)

    def write(self, trainer: pl.Trainer, step: int, row: dict[str, Any]) -> None:
        """Append a row, with step, tokens and seconds first. Values that are not finite are written as null."""
        if not trainer.is_global_zero:
            return
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        front = {"step": step, "tokens": step * self.config.batch.tokens, "seconds": round(self.seconds(), 3)}
        with disk_errors(str(self.path)):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in teardown
            self._file.write(json.dumps({**front, **values}) + "\n")
            self._file.flush()
        if not self._logger_failed:
            try:
                numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
                for logger in trainer.loggers:
                    logger.log_metrics({"tokens": front["tokens"], **numbers}, step=step)
            except Exception as error:  # a logger must never stop a run, whatever it raises
                self._logger_failed = True
                notice(f"--log {self.config.log} failed and is now off ({error}); metrics.jsonl is still written")

    def sync(self) -> None:
        """Flush the file to disk (fsync), so that no checkpoint is newer than its metrics."""
        if self._file is not None:
            with disk_errors(str(self.path)):
                os.fsync(self._file.fileno())
