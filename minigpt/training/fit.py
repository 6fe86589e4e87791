"""The training story: corpus, model, batches, and Lightning's Trainer with our callbacks in the order they act."""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from minigpt.data.batches import Batches, ValidationWindows, validation_windows
from minigpt.data.shards import open_corpus
from minigpt.durable import to_json, write_text
from minigpt.model.gpt import GPT
from minigpt.sampling.config import SamplingConfig
from minigpt.terminal import notice
from minigpt.training.checkpoints import Checkpoints, step_of
from minigpt.training.config import TrainConfig
from minigpt.training.loader import MicroBatches
from minigpt.training.metrics import Metrics, rewind_metrics
from minigpt.training.module import TrainingModule
from minigpt.training.observing import Samples, Validation
from minigpt.training.progress import set_progress, without_signal_broadcast
from minigpt.training.stopping import Agreement


@dataclass(frozen=True)
class Job:
    """A run that is ready to be trained: every question that processes could answer differently is settled."""

    config: TrainConfig
    """Resolved: every field has its number."""
    run: Path
    """runs/NAME."""
    corpus: Path
    """The prepared corpus."""
    start: Path | None
    """The checkpoint to go on from."""


def fit(job: Job) -> None:
    """Train to the last step in this process, which may be one of several.

    Raises:
        Interrupted: asked to stop; a checkpoint was saved at the step that was in progress.
        NonFiniteError: loss or gradient stayed NaN or infinite.
    """
    config, run = job.config, job.run
    rank, world_size = int(os.environ.get("RANK", 0)), config.processes
    if config.trainer.threads or world_size > 1:
        torch.set_num_threads(config.trainer.threads or max(1, (os.cpu_count() or 1) // config.trainer.devices))

    corpus = open_corpus(job.corpus)
    batches = Batches(corpus.train, config.model.block_size, config.batch_size, config.seed, config.data.order)
    windows: ValidationWindows | None = None
    if len(corpus.val):
        windows = validation_windows(corpus.val, config.model.block_size, config.eval.tokens)

    torch.manual_seed(config.seed)
    module = TrainingModule(GPT(config.model), config)
    first_step = step_of(job.start)
    if rank == 0:
        rewind_metrics(run / "metrics.jsonl", first_step)

    agreement = Agreement()
    metrics = Metrics(run, config, batches, agreement, first_step)
    sampling = SamplingConfig(temperature=config.sample.temperature).to_dict()
    checkpoints = Checkpoints(run, config, corpus.tokenizer, corpus.hash, job.start, agreement, metrics, sampling)
    validation = Validation(config, windows, corpus.tokenizer, agreement, metrics, first_step)
    samples = Samples(run, config, corpus.tokenizer, agreement, metrics)

    quiet_lightning()
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if world_size > 1 else "auto",
        precision=config.trainer.precision,
        max_steps=config.trainer.max_steps,
        accumulate_grad_batches=config.accumulation,
        log_every_n_steps=config.trainer.log_every_n_steps,
        # At the end of every step: agree, write, save, and only then spend time on looking.
        callbacks=[agreement, metrics, checkpoints, validation, samples],
        logger=make_loggers(config, run, rank),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    set_progress(trainer, first_step)
    without_signal_broadcast(trainer)
    trainer.fit(module, train_dataloaders=MicroBatches(batches, config, first_step, rank))
    agreement.raise_if_stopped(f"go on with --run_name {run.name} --resume auto")


def quiet_lightning() -> None:
    """Lightning talks about choices that are ours; what matters of them we say ourselves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    os.environ.setdefault("PL_DISABLE_FORK", "1")


def wandb_key_is_known() -> bool:
    """Whether wandb can reach its server without asking: WANDB_MODE decides, else a key in the environment or netrc."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_loggers(config: TrainConfig, run: Path, rank: int) -> list[Any] | bool:
    """Lightning's logger for `--log`, on the first process only; False for none.

    The wandb run id is stored in the run's folder before training begins, so that a resumed run continues it. Without
    an API key wandb works offline, in the run's folder. A logger that cannot be made is announced and left out.
    """
    if config.log == "none" or rank != 0:
        return False
    try:
        if config.log == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return [TensorBoardLogger(run, name="", version="tensorboard")]
        from lightning.pytorch.loggers import WandbLogger

        stored = run / "wandb.json"
        if not stored.is_file():
            write_text(stored, to_json({"id": secrets.token_hex(4)}))
        import wandb

        return [
            WandbLogger(
                project=os.environ.get("WANDB_PROJECT", "minigpt"),
                name=run.name,
                id=json.loads(stored.read_text())["id"],
                save_dir=run,
                offline=not wandb_key_is_known(),
                config=config.to_dict(),
                settings=wandb.Settings(save_code=False, x_disable_meta=True, init_timeout=30, silent=True),
            )
        ]
    except Exception as error:  # a tracker must never stop a run, whatever it raises
        notice(f"--log {config.log} cannot be used ({error}); metrics.jsonl is written all the same")
        return False
