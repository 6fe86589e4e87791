"""From a config to a running job: settle what all processes must agree on, then train in one process or in several."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from minigpt.checkpoint import clean_leftovers, load_training_state, newest_valid
from minigpt.data.batches import Batches
from minigpt.data.shards import prepare
from minigpt.durable import disk_errors, write_text
from minigpt.errors import CheckpointError, ConfigError, DataError, DistributedError, MinigptError
from minigpt.terminal import notice
from minigpt.training.checkpoints import step_of
from minigpt.training.config import TrainConfig
from minigpt.training.fit import Job, fit

# What a checkpoint belongs to: a run with other values here is another run.
FIXED = ("model", "tokenizer", "data", "batch.tokens", "seed")


def train(config: TrainConfig) -> Path:
    """Train as the config says; continue the run where it was if there is one.

    Returns:
        The run's folder: config.yaml, metrics.jsonl, samples/ and checkpoints/.

    Raises:
        MinigptError: see its subclasses in errors.py; whatever was saved stays.
    """
    if "WORLD_SIZE" in os.environ:  # we are one of the processes that torchrun or a scheduler started
        return _train_as_one_of_many(config)
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {config.trainer.num_nodes} machines are started by torchrun or the like, "
            f"on each: torchrun --nnodes {config.trainer.num_nodes} --nproc_per_node {config.trainer.devices} "
            f"--rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ..."
        )
    job = settle(config)
    if step_of(job.start) >= job.config.trainer.max_steps:
        notice(f"{job.run}: finished at step {step_of(job.start)}; raise trainer.max_steps to go on")
    elif config.processes == 1:
        fit(job)
    else:
        _launch(job)
    return job.run


def settle(config: TrainConfig) -> Job:
    """Prepare the corpus, fill in what depends on it, settle name and checkpoint, and write the run's config.yaml."""
    config.check()
    corpus = prepare(config.data, config.tokenizer)
    vocab_size = config.model.vocab_size or corpus.tokenizer.vocab_size
    if vocab_size < corpus.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is less than the tokenizer's {corpus.tokenizer.vocab_size}; leave it out"
        )
    Batches(corpus.train, config.model.block_size, config.batch_size, config.seed, config.data.order)  # long enough?
    source = re.sub(r"[^\w.-]+", "-", Path(config.data.source).stem).strip("-.") or "run"
    name = config.run_name or f"{source}-{datetime.now():%Y%m%d-%H%M%S}"
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"run_name: '{name}' is not a plain folder name; leave slashes and leading dots out")
    config = replace(config, run_name=name, model=replace(config.model, vocab_size=vocab_size))

    run = Path(config.runs_dir) / name
    start = _checkpoint_to_resume(config, run, corpus.hash)
    with disk_errors(str(run)):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    clean_leftovers(run)
    stored = replace(config, resume="auto").to_dict()
    write_text(run / "config.yaml", yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
    return Job(config, run, corpus.folder, start)


def _checkpoint_to_resume(config: TrainConfig, run: Path, corpus_hash: str) -> Path | None:
    before = run / "config.yaml"
    if not before.is_file():
        if config.resume == "must":
            raise CheckpointError(f"{run}: no run to resume there (--resume must); check --run_name and --runs_dir")
        return None
    if config.resume == "never":
        raise ConfigError(f"run_name: {run} exists already (--resume never); choose another name")
    _compare(yaml.safe_load(before.read_text(encoding="utf-8")), config.to_dict(), run)
    start = newest_valid(run, notice)
    if start is None:
        if config.resume == "must":
            raise CheckpointError(f"{run}: holds no finished checkpoint to resume from (--resume must)")
        notice(f"{run}: no checkpoint was finished yet, starting from the first step")
    else:
        trained_on = load_training_state(start)[0].get("corpus")
        if trained_on != corpus_hash:
            raise DataError(
                f"data.source: {config.data.source} has changed since {run} was trained on it (its tokens hash to "
                f"{corpus_hash[:12]}, then {str(trained_on)[:12]}); restore the text, or choose another --run_name"
            )
        notice(f"resuming {run} from {start.name}")
    return start


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _compare(before: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    """Refuse to go on with another model, tokenizer, data or order; announce every other change."""
    old, new = _flatten(before), _flatten(now)
    changed = [key for key in new if key not in ("run_name", "runs_dir", "resume") and old.get(key) != new[key]]
    fixed = [key for key in changed if key.startswith(tuple(f"{name}." for name in FIXED)) or key in FIXED]
    differences = [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in (fixed or changed)]
    if fixed:
        raise ConfigError(f"{run}: cannot be resumed with {', '.join(differences)}; choose another --run_name")
    if changed:
        notice(f"{run}: goes on with {', '.join(differences)}")


def _launch(job: Job) -> None:
    """Run the job in several processes of this machine, under torch's elastic launcher: it names the one that dies."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.config.trainer.devices,
        run_id=f"{job.config.run_name}-{time.time_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    command = ["-m", "minigpt.training.worker", str(job.run), str(job.corpus), str(job.start or "")]
    try:
        elastic_launch(launch, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else DistributedError.exit_code
        how = f"killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        ended = MinigptError if code != DistributedError.exit_code else DistributedError
        stopped = ended(f"process {rank} ended ({how}); go on with --run_name {job.run.name} --resume auto")
        stopped.exit_code = code
        raise stopped from None


def _train_as_one_of_many(config: TrainConfig) -> Path:
    """Under torchrun: the first process settles the job and tells the others."""
    import torch
    import torch.distributed as dist

    if int(os.environ["WORLD_SIZE"]) != config.processes:
        raise ConfigError(
            f"trainer.devices: {config.trainer.devices} x trainer.num_nodes {config.trainer.num_nodes} is not the "
            f"{os.environ['WORLD_SIZE']} processes that were started; make them agree"
        )
    dist.init_process_group("nccl" if _on_gpu(config) else "gloo")
    if _on_gpu(config):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    settled: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            settled = [settle(config)]
        except MinigptError as error:
            settled = [error]
    dist.broadcast_object_list(settled)
    if isinstance(settled[0], MinigptError):
        raise settled[0]
    job: Job = settled[0]
    if step_of(job.start) < job.config.trainer.max_steps:
        fit(job)
    return job.run


def _on_gpu(config: TrainConfig) -> bool:
    import torch

    return config.trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available()
