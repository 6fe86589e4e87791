"""Start training from a config: resolve the job that all processes share, then train in one or several processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from minigpt.errors import ConfigError, DistributedError, Interrupted, MinigptError
from minigpt.terminal import notice
from minigpt.training.budget import plan, report
from minigpt.training.config import TrainConfig
from minigpt.training.processes.join import STARTED_BY_TORCHRUN, agree, connect, tell
from minigpt.training.processes.processes import Processes, search_path
from minigpt.training.run.fit import fit
from minigpt.training.run.settle import Job, settle


def train(config: TrainConfig) -> Path:
    """Train according to the config; resume the run if it already exists.

    Returns:
        The run's folder, with config.yaml, metrics.jsonl, samples/ and checkpoints/.

    Raises:
        MinigptError: see its subclasses in errors.py; saved checkpoints are kept.
    """
    if all(name in os.environ for name in STARTED_BY_TORCHRUN):
        return _train_as_one_of_many(config)
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {config.trainer.num_nodes} machines need torchrun or a similar launcher; run on each: "
            f"torchrun --nnodes {config.trainer.num_nodes} --nproc_per_node {config.trainer.devices} "
            f"--rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ..."
        )
    run_job = fit if config.processes == 1 else _launch
    with ExitStack() as held:
        job = settle(config, held, lambda job: plan(job, run_job))
        if job.finished:
            notice(job.ending)
        else:
            run_job(job)
            report(job)
    return job.run


def _launch(job: Job) -> None:
    """Run the job in several processes on this machine."""
    name = f"{job.config.run_name}-{time.time_ns()}"
    command = [sys.executable, "-m", "minigpt.training.worker", json.dumps(job.to_dict())]
    resume = job.how_to_resume
    with Processes(command, job.config.trainer.devices, name) as processes:
        processes.wait()
        if cause := processes.cause():
            stopped = MinigptError(f"{processes.how_it_ended(cause)}; {resume}")
            stopped.exit_code = cause[1] if cause[1] > 0 else DistributedError.exit_code
            raise stopped
        if stop := processes.stopped_by():
            raise Interrupted(f"stopped by {stop.name}; {resume}", 128 + stop)


def _train_as_one_of_many(config: TrainConfig) -> Path:
    """Train as one process of torchrun: process 0 resolves the job and sends it to the others."""
    if int(os.environ["WORLD_SIZE"]) != config.processes:
        raise ConfigError(
            f"trainer.devices: {config.trainer.devices} x trainer.num_nodes {config.trainer.num_nodes} does not equal "
            f"the {os.environ['WORLD_SIZE']} processes that torchrun started; change one of them"
        )
    import torch.distributed as dist

    store = connect()
    agree(store, "config", config.flat())
    turns = itertools.count()

    def say(values: dict | None) -> dict:
        return tell(dist.PrefixStore(f"turn-{next(turns)}", store), values)

    def probe(job: Job) -> None:
        name = f"probe-{time.time_ns()}"
        say({"probe": job.to_dict(), "name": name})
        _probe_as_one_of_many(job, name)

    with ExitStack() as held:
        if os.environ["RANK"] == "0":
            try:
                told = say({"job": settle(config, held, lambda job: plan(job, probe)).to_dict()})
            except MinigptError as error:
                told = say({"refused": str(error), "exit_code": error.exit_code})
        else:
            while "probe" in (told := say(None)):
                with suppress(MinigptError):  # process 0 gets the same error and reports it
                    _probe_as_one_of_many(Job.from_dict(told["probe"]), told["name"])
        if "refused" in told:
            refused = MinigptError(told["refused"])
            refused.exit_code = told["exit_code"]
            raise refused
        job = Job.from_dict(told["job"])
        if not job.finished:
            fit(job)
        if os.environ["RANK"] == "0":
            notice(job.ending) if job.finished else report(job)
    return job.run


def _probe_as_one_of_many(job: Job, name: str) -> None:
    """Run a probe as a child of each process that torchrun started; the children meet at the same store."""
    settings = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # use the existing store, do not open another
        "TORCHELASTIC_RESTART_COUNT": name,  # a separate namespace in the store
        **search_path(),
    }
    command = [sys.executable, "-m", "minigpt.training.worker", json.dumps(job.to_dict())]
    ended = subprocess.run(command, env={**os.environ, **settings}, check=False)
    if ended.returncode:
        failed = DistributedError(f"minutes: the timing probe failed (exit code {ended.returncode}); see above")
        failed.exit_code = ended.returncode if ended.returncode > 0 else failed.exit_code
        raise failed
