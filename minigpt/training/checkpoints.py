"""Saving while it trains, and going on from what was saved."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from minigpt.checkpoint import (
    load_weights,
    prune,
    read_training_state,
    read_training_tensors,
    read_weights,
    save_checkpoint,
)
from minigpt.terminal import notice
from minigpt.tokenizer.base import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.each_step import EachStep, due
from minigpt.training.metrics import Metrics
from minigpt.training.module import TrainingModule
from minigpt.training.optimizer import optimizer_tensors, restore_optimizer
from minigpt.training.stopping import Agreement


class Checkpoints(EachStep):
    """Restores the checkpoint a run goes on from, then saves every `checkpoint.every` steps, at the end and on a stop.

    Args:
        run: the run's folder.
        config: the resolved config, stored in every checkpoint.
        tokenizer: stored in every checkpoint.
        corpus_hash: identity of the training tokens, stored so that a resume notices other ones.
        start: the checkpoint to go on from, or None.
        sampling: sampling defaults for generation_config.json.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        tokenizer: Tokenizer,
        corpus_hash: str,
        start: Path | None,
        agreement: Agreement,
        metrics: Metrics,
        sampling: dict[str, Any],
    ) -> None:
        self.run, self.config, self.tokenizer, self.start = run, config, tokenizer, start
        self.corpus_hash = corpus_hash
        self.agreement, self.metrics, self.sampling = agreement, metrics, sampling

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.start is None:
            return
        assert isinstance(pl_module, TrainingModule)
        state = read_training_state(self.start)
        load_weights(pl_module.model, read_weights(self.start)[1], self.start)
        restore_optimizer(trainer.optimizers[0], pl_module.model, read_training_tensors(self.start))
        self.metrics.seconds_before = state["seconds"]
        if trainer.is_global_zero:
            self._announce_changes(state["environment"], environment(pl_module.device))

    def _announce_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
        if changed:
            notice(f"the run goes on, but not to the bit, since this changed: {', '.join(changed)}")

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if due(step, self.config.checkpoint.every, self.config.trainer.max_steps) or self.agreement.stopping:
            if trainer.is_global_zero:
                self._save(trainer, module, step)
            if trainer.world_size > 1:
                dist.barrier()

    def _save(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        began = time.monotonic()
        self.metrics.sync()
        save_checkpoint(
            self.run / "checkpoints" / f"step-{step:08d}",
            module.model,
            self.tokenizer,
            sampling=self.sampling,
            train_config=self.config.to_dict(),
            state={
                "step": step,
                "tokens": step * self.config.batch.tokens,
                "corpus": self.corpus_hash,
                "seconds": self.metrics.seconds(),
                "environment": environment(module.device),
            },
            state_tensors=optimizer_tensors(trainer.optimizers[0], module.model),
        )
        prune(self.run, self.config.checkpoint.keep)
        self.metrics.paused += time.monotonic() - began


def environment(device: torch.device) -> dict[str, Any]:
    """What must stay as it is for a resumed run to be equal to the bit, beside the config."""
    return {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
    }
