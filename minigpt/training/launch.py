"""Config -> a running job: settle what all processes must agree on, then train in one process or several."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from minigpt.errors import ConfigError, DistributedError, Interrupted, MinigptError
from minigpt.plugins import modules_needed
from minigpt.terminal import notice
from minigpt.training.budget import plan, report
from minigpt.training.config import TrainConfig
from minigpt.training.processes.join import STARTED_BY_TORCHRUN, agree, connect, tell
from minigpt.training.processes.processes import Processes, search_path
from minigpt.training.run.fit import NOTHING, fit
from minigpt.training.run.job import Job, Objects
from minigpt.training.run.settle import settle


def train(config: TrainConfig, objects: Objects = NOTHING) -> Path:
    """Train a run, or resume it if it exists.

    Args:
        config: all settings.
        objects: what a script passes; only for one process, or under torchrun, where every process runs the script.

    Returns:
        The run's folder, with config.yaml, metrics.jsonl, samples/ and checkpoints/.

    Raises:
        MinigptError: see its subclasses in errors.py; saved checkpoints stay.
    """
    config = replace(config, plugins=list(modules_needed()))
    if config.processes > 1 and (own := config.registered_in("__main__")):
        raise ConfigError(
            f"{own[0]}: was registered in a script, which other processes do not run; put it into a module that the "
            f"script imports"
        )
    if all(name in os.environ for name in STARTED_BY_TORCHRUN):
        return _train_as_one_of_many(config, objects)
    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes: {config.trainer.num_nodes} machines need torchrun or a similar launcher; run on each: "
            f"torchrun --nnodes {config.trainer.num_nodes} --nproc_per_node {config.trainer.devices} "
            f"--rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ..."
        )
    if config.processes > 1 and (objects.model is not None or objects.callbacks):
        raise ConfigError(
            f"trainer.devices: {config.trainer.devices}, but model= and callbacks= do not reach other processes; start "
            f"the script with torchrun, or set devices to 1"
        )
    run_job = partial(fit, objects=objects) if config.processes == 1 else _launch
    with ExitStack() as held:
        job = settle(config, held, lambda job: plan(job, run_job), objects.corpus)
        if job.finished:
            notice(job.ending)
        else:
            run_job(job)
            report(job)
    return job.run


def _launch(job: Job) -> None:
    """Run the job in several processes on this machine."""
    name = f"{job.config.run_name}-{time.time_ns()}"
    resume = job.how_to_resume
    with Processes(_worker(job), job.config.trainer.devices, name) as processes:
        processes.wait()
        if cause := processes.cause():
            stopped = MinigptError(f"{processes.how_it_ended(cause)}; {resume}")
            stopped.exit_code = cause[1] if cause[1] > 0 else DistributedError.exit_code
            raise stopped
        if stop := processes.stopped_by():
            raise Interrupted(f"stopped by {stop.name}; {resume}", 128 + stop)


def _worker(job: Job) -> list[str]:
    """The command of a process that trains the job, with the plug-ins that this process has."""
    values = {**job.to_dict(), "plugins": list(modules_needed())}
    return [sys.executable, "-m", "minigpt.training.worker", json.dumps(values)]


def _train_as_one_of_many(config: TrainConfig, objects: Objects) -> Path:
    """Train under torchrun: the first process resolves the job and sends it to the others."""
    if int(os.environ["WORLD_SIZE"]) != config.processes:
        raise ConfigError(
            f"trainer.devices: {config.trainer.devices} x trainer.num_nodes {config.trainer.num_nodes} differs from "
            f"the {os.environ['WORLD_SIZE']} processes that torchrun started; change one to match the other"
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
                told = say({"job": settle(config, held, lambda job: plan(job, probe), objects.corpus).to_dict()})
            except MinigptError as error:
                told = say({"refused": str(error), "exit_code": error.exit_code})
        else:
            while "probe" in (told := say(None)):
                with suppress(MinigptError):  # the first process gets the same error and reports it
                    _probe_as_one_of_many(Job.from_dict(told["probe"]), told["name"])
        if "refused" in told:
            refused = MinigptError(told["refused"])
            refused.exit_code = told["exit_code"]
            raise refused
        job = Job.from_dict(told["job"])
        if not job.finished:
            fit(job, objects)
        if os.environ["RANK"] == "0":
            notice(job.ending) if job.finished else report(job)
    return job.run


def _probe_as_one_of_many(job: Job, name: str) -> None:
    """Run a probe: each process that torchrun started starts a child, and the children meet at the same store."""
    settings = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already: no process opens another
        "TORCHELASTIC_RESTART_COUNT": name,  # a separate prefix in the store
        **search_path(),
    }
    ended = subprocess.run(_worker(job), env={**os.environ, **settings}, check=False)
    if ended.returncode:
        failed = DistributedError(f"the timing probe failed (exit code {ended.returncode}); see its message above")
        failed.exit_code = ended.returncode if ended.returncode > 0 else failed.exit_code
        raise failed
