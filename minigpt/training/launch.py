"""From a config to a running job: settle what all processes must agree on, then train in one process or in several."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from minigpt.errors import ConfigError, DistributedError, Interrupted, MinigptError
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.fit import fit
from minigpt.training.settle import Job, settle

# What torchrun tells each process that it starts.
STARTED_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train(config: TrainConfig) -> Path:
    """Train as the config says; continue the run where it was if there is one.

    Returns:
        The run's folder: config.yaml, metrics.jsonl, samples/ and checkpoints/.

    Raises:
        MinigptError: see its subclasses in errors.py; whatever was saved stays.
    """
    if all(name in os.environ for name in STARTED_BY_TORCHRUN):
        return _train_as_one_of_many(config)
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {config.trainer.num_nodes} machines are started by torchrun or the like, "
            f"on each: torchrun --nnodes {config.trainer.num_nodes} --nproc_per_node {config.trainer.devices} "
            f"--rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ..."
        )
    with ExitStack() as held:
        job = settle(config, held)
        if job.finished:
            notice(f"{job.run}: finished at step {job.first_step}; raise trainer.max_steps to go on")
        elif config.processes == 1:
            fit(job)
        else:
            _launch(job)
    return job.run


def _launch(job: Job) -> None:
    """Run the job in several processes of this machine, under torch's elastic launcher: it names the one that dies."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
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
    resume = f"go on with --run_name {job.run.name} --resume auto"
    try:
        elastic_launch(launch, sys.executable)("-m", "minigpt.training.worker", json.dumps(job.to_dict()))
    except SignalException as error:  # we were told to stop; the processes were told too, saved and left
        raise Interrupted(f"stopped by {error.sigval.name}; {resume}", 128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        stopped = MinigptError(f"process {rank} ended ({how}); {resume}")
        stopped.exit_code = failure.exitcode if failure.exitcode > 0 else DistributedError.exit_code
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
    on_gpu = config.trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo")
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # preparing a corpus may take hours
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistributedError(f"process {os.environ['RANK']} cannot join the others at {where} ({error})") from error
    with ExitStack() as held:
        told: list = [None]
        if dist.get_rank() == 0:
            try:
                told = [settle(config, held).to_dict()]
            except MinigptError as error:
                told = [(error.exit_code, str(error))]
        dist.broadcast_object_list(told, group=patient)
        if isinstance(told[0], tuple):
            refused = MinigptError(told[0][1])
            refused.exit_code = told[0][0]
            raise refused
        job = Job.from_dict(told[0])
        if not job.finished:
            fit(job)
        elif dist.get_rank() == 0:
            notice(f"{job.run}: finished at step {job.first_step}; raise trainer.max_steps to go on")
    return job.run
