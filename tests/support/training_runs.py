"""Tiny training runs for the tests: a text of ten words, models of a few thousand parameters, a second or two."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from forks import Fork, children_of, in_forks
from minigpt.data.config import DataConfig
from minigpt.errors import MinigptError
from minigpt.model.config import GPTConfig
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.training import worker
from minigpt.training.config import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    TrainerConfig,
)
from minigpt.training.launch import train
from minigpt.training.processes import processes
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.settle import settle


def corpus_file(folder: Path) -> Path:
    """About 4 KB of text in one file."""
    path = folder / "corpus.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "rats"]
    text = " ".join(words[hashlib.sha256(bytes([i % 251, i // 251])).digest()[0] % 10] for i in range(1000))
    path.write_text(text, encoding="utf-8")
    return path


def tiny_run(folder: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """A config whose runs live in `folder`; a change is named section__field, as in trainer__max_steps=4.

    In float32, whatever this machine would choose: what is compared to 1e-5 or to the bit must not depend on it.
    """
    config = TrainConfig(
        run_name=name,
        runs_dir=str(folder / "runs"),
        seed=3,
        data=DataConfig(source=str(corpus_file(folder)), folder=str(folder / "data")),
        tokenizer=TokenizerConfig(kind="byte"),
        model=GPTConfig(preset="gpt2", block_size=16, n_layer=2, n_head=2, n_embd=16),
        batch=BatchConfig(tokens=128),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=2, schedule="cosine"),
        trainer=TrainerConfig(max_steps=8, log_every_n_steps=1, accelerator="cpu", threads=1, precision="32-true"),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=0),
        sample=SampleConfig(max_new_tokens=0),
    )
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            sections.setdefault(section, {})[field] = value
        else:
            config = replace(config, **{section: value})
    for section, values in sections.items():
        old = getattr(config, section)
        if section == "model":  # derived fields must follow from the new sizes and preset
            given = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "preset": "gpt2"}
            config = replace(config, model=GPTConfig(**{**given, **values}))
        else:
            config = replace(config, **{section: replace(old, **values)})
    return config


def run_and_read(config: TrainConfig) -> tuple[Path, list[dict[str, Any]]]:
    """Train; the run's folder and its rows of metrics."""
    run = train(config)
    return run, read_metrics(run / "metrics.jsonl")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """The training losses, by step."""
    return [row["train/loss"] for row in rows if "train/loss" in row]


def saved_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        **safetensors.torch.load_file(folder / "model.safetensors"),
        **safetensors.torch.load_file(folder / "training_state.safetensors"),
    }


def assert_equal_to_the_bit(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def forked(config: TrainConfig, before: Callable[[int], None] = lambda rank: None) -> dict[int, int]:
    """The run in config.processes forks of this process, which spares the seconds that imports take.

    Args:
        config: what to train.
        before: called in each fork with its rank, before it trains: a place to break something.

    Returns:
        rank -> exit code; negative for the signal that killed it.
    """
    with ExitStack() as held:
        job = json.dumps(settle(config, held).to_dict())

        def target(rank: int) -> int:
            before(rank)
            return worker.main(job)

        return in_forks(config.processes, target)


class Started:
    """`python train.py` in a process of its own, with this config; a context manager that leaves nothing behind."""

    def __init__(self, config: TrainConfig, *launcher: str) -> None:
        self.run = Path(config.runs_dir) / str(config.run_name)
        self.run.parent.mkdir(exist_ok=True)
        self.errors = self.run.parent / "errors.txt"
        self.process = self.start(config, *launcher)

    def start(self, config: TrainConfig, *launcher: str) -> subprocess.Popen | Fork:
        file = self.run.parent / f"{config.run_name}-given.yaml"
        file.write_text(yaml.safe_dump(config.to_dict()))
        command = [sys.executable, *launcher, "train.py", "--config", str(file)]
        with self.errors.open("w") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=Path(__file__).parents[2])

    def __enter__(self) -> Started:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            print(self.errors.read_text(), file=sys.stderr)
        for pid in [*self.workers().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until the condition holds. Fails if the process ends before."""
        while not condition():
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Until the metrics have a row of this step or a later one."""
        rows = self.run / "metrics.jsonl"
        self.wait_for(lambda: (found := read_metrics(rows)) and found[-1]["step"] >= step)

    def end(self) -> tuple[int, str]:
        """Exit code and what it said, once it has ended."""
        code = self.process.wait()
        assert code is not None
        return code, self.errors.read_text()

    def last_step(self) -> int:
        """The step of the last row."""
        return read_metrics(self.run / "metrics.jsonl")[-1]["step"]

    def workers(self) -> dict[int, int]:
        """Rank -> process id of the processes that this one started (Linux)."""
        found = {}
        for pid in children_of(self.process.pid):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found.update({int(each[5:]): pid for each in variables if each.startswith(b"RANK=")})
        return found


class StartedFork(Started):
    """`minigpt train` in a fork of this process, and the processes that it starts in forks of that: no imports."""

    def start(self, config: TrainConfig, *launcher: str) -> Fork:
        def start(command: list[str], env: dict[str, str], **options: object) -> Fork:
            def work() -> int:
                os.environ.update(env)
                return worker.main(command[-1])

            return Fork(work, session=True)

        def command_line() -> int:
            processes.subprocess.Popen = start  # type: ignore[misc, assignment]
            try:
                train(config)
            except MinigptError as error:
                print(error, file=sys.stderr)
                return error.exit_code
            return 0

        return Fork(command_line, self.errors)

    def workers(self) -> dict[int, int]:
        """Rank -> process id; forks are started in the order of their ranks."""
        return dict(enumerate(sorted(children_of(self.process.pid))))
