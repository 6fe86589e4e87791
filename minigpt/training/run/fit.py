"""Training: corpus, model, batches, and Lightning's Trainer with our callbacks in order."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from minigpt.data.batches import Batches, ValidationWindows, validation_windows
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, DistributedError, Interrupted
from minigpt.evaluation.loss import byte_lengths
from minigpt.internals.dynamics.context import held_out_windows
from minigpt.model.device import memory_errors
from minigpt.model.gpt import GPT
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.terminal import hushed
from minigpt.training.config import TrainConfig
from minigpt.training.processes.join import agree, code_identity, connect, join
from minigpt.training.processes.watch import Watch
from minigpt.training.recipe.strategy import make_strategy
from minigpt.training.run.agreement import Agreement
from minigpt.training.run.checkpoints import Checkpoints
from minigpt.training.run.internals import Internals
from minigpt.training.run.job import Job, Objects
from minigpt.training.run.loader import MicroBatches
from minigpt.training.run.loggers import finish, make_loggers
from minigpt.training.run.metrics import Metrics, rewind_metrics
from minigpt.training.run.module import TrainingModule
from minigpt.training.run.observing import Samples, Validation
from minigpt.training.run.progress import NoProfiler, set_progress, without_signals
from minigpt.training.run.rehearsal import Rehearsal, training_advice

NOTHING = Objects()


def fit(job: Job, objects: Objects = NOTHING) -> None:
    """Train to the last step in this process, which may be one of several.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was saved after the step in progress.
        NonFiniteError: loss or gradient was NaN or infinite for several steps in a row.
        NotLearning: gradients are zero, missing, or differ between the compiled and the uncompiled model.
        MemoryExceeded: out of memory; found before anything is written.
        DistributedError: the processes cannot connect, were started with different settings, or one was lost.
    """
    agreement = Agreement()
    resume = job.how_to_resume
    with agreement.listening(), hushed(job.probe), foreign_errors(job.config, resume), ExitStack() as held:
        _fit(job, objects, agreement, resume, held)
    agreement.raise_if_stopped(resume)


def _fit(job: Job, objects: Objects, agreement: Agreement, resume: str, held: ExitStack) -> None:
    config, run = job.config, job.run
    world_size = config.processes
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    if config.trainer.threads or world_size > 1:
        held.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.trainer.threads or max(1, torch.get_num_threads() // config.trainer.devices))

    corpus = open_corpus(job.corpus)
    watch = None
    if world_size > 1:
        store = connect()
        agree(store, "code or corpus", {"corpus": corpus.hash, **code_identity()})
        join(store, config.trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available())
        watch = Watch(run, rank, world_size, config.trainer.hang_seconds, resume)
        held.enter_context(watch.watching())  # start now, as the following code takes long in some processes only
    batches = Batches(corpus.train, config.model.block_size, config.batch_size, config.seed, config.data.order)
    windows: ValidationWindows | None = None
    if len(corpus.val):
        given = corpus.tokenizer.given_ids
        windows = validation_windows(corpus.val, config.model.block_size, config.eval.tokens, given)

    torch.manual_seed(config.seed)
    model = GPT(config.model) if objects.model is None else objects.model
    module = TrainingModule(deepcopy(model) if job.probe else model, config)
    if rank == 0:
        rewind_metrics(run / "metrics.jsonl", job.first_step)

    loader = MicroBatches(batches, config, job.first_step, rank)
    metrics = Metrics(run, config, loader, agreement, job.first_step)
    sampling = SamplingConfig(temperature=config.sample.temperature).to_dict()
    checkpoints = Checkpoints(run, config, corpus.tokenizer, corpus.hash, job.start, agreement, metrics, sampling)
    owed_at = {what: job.first_step if what in job.owed else None for what in ("validation", "sample")}
    assert config.model.vocab_size is not None
    lengths = byte_lengths(corpus, "val", corpus.tokenizer, config.model.vocab_size)
    validation = Validation(
        config, windows, lengths, agreement, metrics, checkpoints, job.standing, owed_at["validation"]
    )
    samples = Samples(run, config, corpus.tokenizer, agreement, metrics, owed_at["sample"])

    rehearsal = Rehearsal(config, batches, windows, metrics)
    inside = []
    if config.internals.every and not job.probe:
        inside = [Internals(config, held_out_windows(corpus, config.model.block_size), metrics)]

    quiet_lightning()
    precision = config.trainer.precision
    assert precision != "auto", "settle resolves it"
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=make_strategy(config),
        precision=precision,
        max_steps=job.last_step,
        accumulate_grad_batches=config.accumulation,
        log_every_n_steps=config.trainer.log_every_n_steps,
        # Rehearse before the first step. At the end of each step: agree on signals, write metrics, save, then validate.
        callbacks=[
            *([watch] if watch else []),
            agreement,
            metrics,
            rehearsal,
            *inside,
            checkpoints,
            validation,
            samples,
            *([] if job.probe else objects.callbacks),
        ],
        plugins=[TorchElasticEnvironment() if world_size > 1 else LightningEnvironment()],  # not SLURM's: it requeues
        logger=make_loggers(config, run, rank),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        profiler=NoProfiler(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    set_progress(trainer, job.first_step)
    without_signals(trainer)
    try:
        trainer.fit(module, train_dataloaders=loader)
    finally:
        finish(trainer.loggers)


@contextmanager
def foreign_errors(config: TrainConfig, resume: str) -> Iterator[None]:
    """Context manager: turn expected errors of torch and Lightning into minigpt's errors."""
    try:
        with memory_errors(training_advice(config)):
            yield
    except SystemExit as error:  # Lightning calls exit(1) for a Ctrl-C before the first step
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Interrupted(f"stopped; {resume}") from None
        raise
    except MisconfigurationException as error:
        if "closure hasn't been executed" in str(error):
            raise ConfigError(
                f"optimizer.name: '{config.optimizer.name}': its step(closure) must call closure() with gradients "
                f"enabled before it updates, as torch's optimizers do"
            ) from error
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "closed by peer" not in str(error):
            raise
        raise DistributedError(
            f"lost the connection to another process ({str(error).splitlines()[0]}); {resume}"
        ) from error


def quiet_lightning() -> None:
    """Silence Lightning's messages about settings that minigpt makes; minigpt reports the important ones itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
