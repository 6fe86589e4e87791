"""The training story: corpus, model, batches, and Lightning's Trainer with our callbacks in the order they act."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from minigpt.data.batches import Batches, ValidationWindows, validation_windows
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, Interrupted, MemoryExceeded
from minigpt.model.gpt import GPT
from minigpt.sampling.config import SamplingConfig
from minigpt.training.checkpoints import Checkpoints
from minigpt.training.config import TrainConfig
from minigpt.training.loader import MicroBatches
from minigpt.training.loggers import finish, make_loggers
from minigpt.training.metrics import Metrics, rewind_metrics
from minigpt.training.module import TrainingModule
from minigpt.training.observing import Samples, Validation
from minigpt.training.progress import set_progress, without_signal_broadcast
from minigpt.training.settle import Job
from minigpt.training.stopping import Agreement


def fit(job: Job) -> None:
    """Train to the last step in this process, which may be one of several.

    Raises:
        Interrupted: asked to stop; a checkpoint was saved at the step that was in progress.
        NonFiniteError: loss or gradient stayed NaN or infinite.
    """
    config, run = job.config, job.run
    world_size = config.processes
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    if config.trainer.threads or world_size > 1:
        torch.set_num_threads(config.trainer.threads or max(1, torch.get_num_threads() // config.trainer.devices))

    corpus = open_corpus(job.corpus)
    batches = Batches(corpus.train, config.model.block_size, config.batch_size, config.seed, config.data.order)
    windows: ValidationWindows | None = None
    if len(corpus.val):
        windows = validation_windows(corpus.val, config.model.block_size, config.eval.tokens)

    torch.manual_seed(config.seed)
    module = TrainingModule(GPT(config.model), config)
    if rank == 0:
        rewind_metrics(run / "metrics.jsonl", job.first_step)

    agreement = Agreement()
    metrics = Metrics(run, config, batches, agreement, job.first_step)
    sampling = SamplingConfig(temperature=config.sample.temperature).to_dict()
    checkpoints = Checkpoints(run, config, corpus.tokenizer, corpus.hash, job.start, agreement, metrics, sampling)
    owed_at = {what: job.first_step if what in job.owed else None for what in ("validation", "sample")}
    validation = Validation(config, windows, corpus.tokenizer, agreement, metrics, owed_at["validation"])
    samples = Samples(run, config, corpus.tokenizer, agreement, metrics, owed_at["sample"])

    quiet_lightning()
    precision = config.trainer.precision
    assert precision != "auto", "settle decides it"
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if world_size > 1 else "auto",
        precision=precision,
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
    set_progress(trainer, job.first_step)
    without_signal_broadcast(trainer)
    resume = f"go on with --run_name {run.name} --resume auto"
    try:
        with foreign_errors(config, resume):
            trainer.fit(module, train_dataloaders=MicroBatches(batches, config, job.first_step, rank))
    finally:
        finish(trainer.loggers)
    agreement.raise_if_stopped(resume)


@contextmanager
def foreign_errors(config: TrainConfig, resume: str) -> Iterator[None]:
    """Turn what torch and Lightning raise for a user's circumstances into our errors."""
    try:
        yield
    except SystemExit as error:  # Lightning turns a Ctrl-C before the first step into exit(1)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Interrupted(f"stopped; {resume}") from None
        raise
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        rows = config.micro_batch_size
        raise MemoryExceeded(
            f"out of memory with {rows} rows of {config.model.block_size} tokens a forward; give "
            f"--batch.micro_batch_size {max(1, rows // 2)}: the rest of the step is accumulated, with the same result"
        ) from error


def quiet_lightning() -> None:
    """Lightning talks about choices that are ours; what matters of them we say ourselves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
