"""Save checkpoints during training, and resume from them."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.checkpoint.checkpoint import read_training_state, read_training_tensors, read_weights
from minigpt.checkpoint.filling import load_weights
from minigpt.checkpoint.pruning import prune
from minigpt.checkpoint.runs import Best, read_best, record_best, step_of
from minigpt.checkpoint.saving import save_checkpoint, state_of
from minigpt.checkpoint.tensors import refuse_nonfinite
from minigpt.durable import check_space
from minigpt.model.cost import cost_of
from minigpt.terminal import notice
from minigpt.tokenizer.base import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.average import Average
from minigpt.training.recipe.optimizer import optimizer_bytes, optimizer_tensors, restore_optimizer
from minigpt.training.recipe.sharding import gather, share_out
from minigpt.training.run.agreement import Agreement
from minigpt.training.run.each_step import EachStep, due
from minigpt.training.run.metrics import Metrics
from minigpt.training.run.module import TrainingModule

RAW = "raw/"  # prefix of the raw weights' names, used when model.safetensors holds averaged weights


class Checkpoints(EachStep):
    """Restore the checkpoint to resume from, and save checkpoints.

    Saves every `checkpoint.every` steps, at the end, on a stop signal, and at each new best validation loss.

    Args:
        run: the run's folder.
        config: the resolved config, stored in every checkpoint.
        tokenizer: stored in every checkpoint.
        corpus_hash: hash of the training tokens, stored so that a resume detects a different corpus.
        start: the checkpoint to resume from, or None.
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
        self.saved = step_of(start) if start else 0  # step of the newest checkpoint
        self.best = read_best(run)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self.start is not None:
            state = read_training_state(self.start)
            restore(trainer.optimizers[0], pl_module, self.start, state)
            self.metrics.seconds_before = state["seconds"]
            if trainer.is_global_zero:
                self._announce_changes(state["environment"], environment(pl_module.device))
        elif pl_module.average:
            pl_module.average = Average(pl_module.model, pl_module.average.decay)  # on the model's device now
        if trainer.is_global_zero:  # find a disk without space for one checkpoint before training
            weights = 4 * cost_of(self.config.model).parameters * (2 if pl_module.average else 1)
            check_space(
                self.run / "checkpoints", weights + int(optimizer_bytes(self.config.model, self.config.optimizer))
            )

    def _announce_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [f"{key} {before[key]} -> {value}" for key, value in now.items() if before.get(key, value) != value]
        if changed:
            notice(f"resuming, but not bit-identical, since the environment changed: {', '.join(changed)}")

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        asked = self.agreement.stopping or self.agreement.save_now
        if asked or due(step, self.config.checkpoint.every, self.config.trainer.max_steps):
            self.ensure(trainer, module, step)

    def ensure(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        """Save the current step unless it is saved already. Collective."""
        if self.saved == step:
            return
        began = time.monotonic()
        weights, tensors = training_tensors(trainer, module)
        if trainer.is_global_zero:
            self._save(module, step, weights, tensors)
            self._prune()
        if trainer.world_size > 1:
            dist.barrier()
        self.saved = step
        self.metrics.pause("save", time.monotonic() - began)

    def keep_best(self, trainer: pl.Trainer, module: TrainingModule, best: Best) -> None:
        """Save a step with a new best validation loss and record it as the best. Collective."""
        self.ensure(trainer, module, best.step)
        self.best = best
        if trainer.is_global_zero:
            record_best(self.run, best)
            self._prune()  # may remove the previous best

    def _prune(self) -> None:
        prune(self.run, self.config.checkpoint.keep, self.best.step if self.best else None)

    def _save(self, module: TrainingModule, step: int, weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        self.metrics.sync()
        state = {
            "step": step,
            "tokens": step * self.config.batch.tokens,
            "corpus": self.corpus_hash,
            "seconds": self.metrics.seconds(),
            "environment": environment(module.device),
        }
        if module.average:
            state["average_updates"] = module.average.updates
        save_checkpoint(
            self.run / "checkpoints" / f"step-{step:08d}",
            module.model,
            self.tokenizer,
            weights=weights,
            sampling=self.sampling,
            train_config=self.config.to_dict(),
            state=state,
            state_tensors=tensors,
        )


def training_tensors(trainer: pl.Trainer, module: TrainingModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a checkpoint by name: the evaluated weights, and the training state (optimizer, raw weights)."""
    moments = gather(optimizer_tensors(trainer.optimizers[0], module.model))
    weights = gather(state_of(module.model))
    if module.average is None:
        return weights, moments
    return gather(module.average.tensors), {**{RAW + name: tensor for name, tensor in weights.items()}, **moments}


def restore(optimizer: torch.optim.Optimizer, module: TrainingModule, start: Path, state: dict[str, Any]) -> None:
    """Load the tensors saved by training_tensors: weights, averaged weights and optimizer state.

    If averaging is newly enabled, the average starts from the saved weights. If it is newly disabled, training
    continues from the raw weights. Raises CheckpointError if a tensor does not match the model, and NonFiniteError if
    one holds NaN or infinity.
    """
    weights, tensors = read_weights(start)[1], read_training_tensors(start)
    refuse_nonfinite(weights, f"{start}: cannot be resumed")
    raw = {name.removeprefix(RAW): tensor for name, tensor in tensors.items() if name.startswith(RAW)}
    load_weights(module.model, share_out(raw or weights, module.model), start)
    moments = {name: tensor for name, tensor in tensors.items() if not name.startswith(RAW)}
    restore_optimizer(optimizer, module.model, moments)
    if module.average:
        module.average = Average(module.model, module.average.decay)
        if raw:
            module.average.restore(weights, state.get("average_updates", 0))


def processor() -> str:
    """Name of this machine's processor, as reported by the system: floating-point sums may differ between models."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """What must not change, besides the config, for a resumed run to be bit-identical."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
    }
