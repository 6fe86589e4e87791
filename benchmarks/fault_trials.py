"""Fault-injection trials for checkpoints: kills, failing system calls, power cuts, full disks, bit flips.

Each function runs one trial, or all trials of its kind, on a tiny run and returns what went wrong (nothing if all is
well). faults.py repeats them and prints the table; the tests run a few of them.

A trial runs in a forked child process. The parent imports torch once and must not have started torch threads before.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.pruning import prune
from minigpt.checkpoint.runs import Best, best_or_newest, checkpoints_of, newest_valid, read_best, record_best
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.errors import MinigptError
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT
from minigpt.tokenizer.plain import ByteTokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.launch import train
from minigpt.training.run.metrics import read_metrics

KEEP = 2


def busy_config(folder: Path, name: str, **trainer: Any) -> TrainConfig:
    """Config of a 24-step run with all features: Muon, dropout, accumulation, EMA, validation, samples, many saves."""
    corpus = folder / "corpus.txt"
    if not corpus.is_file():
        draw = random.Random(0)
        corpus.write_text(" ".join(draw.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(900)))
    return TrainConfig.from_dict(
        {
            "run_name": name,
            "runs_dir": str(folder / "runs"),
            "data": {"source": str(corpus), "folder": str(folder / "data")},
            "tokenizer": {"kind": "byte"},
            "model": {
                "block_size": 16,
                "n_layer": 1,
                "n_head": 2,
                "n_embd": 16,
                "dropout": 0.2,
                "bigram_rows": 32,
                "trigram_rows": 32,
            },
            "batch": {"tokens": 64, "micro_batch_size": 1},
            "optimizer": {"warmup_steps": 2, "ema_decay": 0.8},
            "trainer": {
                "max_steps": 24,
                "accelerator": "cpu",
                "threads": 1,
                "precision": "32-true",
                "compile": False,
                "log_every_n_steps": 1,
                **trainer,
            },
            "checkpoint": {"every": 3, "keep": KEEP},
            "eval": {"every": 4},
            "sample": {"every": 8, "max_new_tokens": 3},
        }
    )


@dataclass
class Outcome:
    """The results of a run that must not depend on interruptions."""

    rows: list[tuple]
    tensors: dict[str, torch.Tensor]
    samples: dict[str, str]

    def differences(self, other: Outcome) -> list[str]:
        """List what is not bit-identical."""
        found = [] if self.rows == other.rows else ["the rows of metrics differ"]
        if self.samples != other.samples:
            found.append("the samples differ")
        if self.tensors.keys() != other.tensors.keys():
            return [*found, "the tensors have other names"]
        return found + [f"{n} differs" for n, t in self.tensors.items() if not torch.equal(t, other.tensors[n])]


def outcome(run: Path) -> Outcome:
    """Read a run's results: losses of every step, tensors of the newest checkpoint, samples."""
    newest = checkpoints_of(run)[0]
    rows = [
        (row["step"], row.get("train/loss"), row.get("val/loss"), row.get("batch"))
        for row in read_metrics(run / "metrics.jsonl")
        if "time/training" not in row  # the time summary, which a killed process does not write
    ]
    tensors = {}
    for name in ("model", "training_state"):
        loaded = safetensors.torch.load_file(newest / f"{name}.safetensors")
        tensors |= {f"{name}: {key}": tensor for key, tensor in loaded.items()}
    return Outcome(rows, tensors, {path.name: path.read_text() for path in (run / "samples").iterdir()})


# Forked children.


def start(work: Callable[[], object]) -> int:
    """Run `work` in a forked child, without output; return its process id. A MinigptError sets its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        code = 0
    except MinigptError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal number if a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; return its exit code."""
    return wait(start(work))


# Kills at random moments.


def leftovers(run: Path) -> list[str]:
    """List what a finished run must not contain: temporary files and folders, surplus checkpoints."""
    found = [str(path) for path in [*run.rglob(".tmp-*"), *run.rglob(".*.????????")]]
    if len(checkpoints_of(run)) > KEEP + 1:
        found.append(f"{len(checkpoints_of(run))} checkpoints")
    return found


def kill_once(config: TrainConfig, after: float, least: int) -> tuple[bool, int, list[str]]:
    """Resume a run in a child and kill it after `after` seconds, unless it has finished.

    Args:
        config: config of the run.
        after: seconds.
        least: newest saved step so far; the run must not lose it.

    Returns:
        (whether it finished, newest saved step, errors).
    """
    child = start(lambda: train(config))
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
    code = wait(child)
    run = Path(config.runs_dir) / str(config.run_name)
    skipped: list[str] = []
    newest = newest_valid(run, skipped.append)
    step = int(newest.name.removeprefix("step-")) if newest else 0
    wrong = list(skipped)
    if step < least:
        wrong.append(f"step {least} was saved, now the newest is {step}")
    if code not in (0, -signal.SIGKILL):
        wrong.append(f"exit code {code}")
    temporary = len(list((run / "checkpoints").glob(".tmp-*")))
    if len(checkpoints_of(run)) + temporary > KEEP + 4:  # best, the one being saved, the ones being pruned
        wrong.append(f"{len(checkpoints_of(run))} checkpoints and {temporary} temporary folders")
    return code == 0, step, wrong


def chain(folder: Path, expected: Outcome, longest: float, kills: int, seed: int) -> tuple[int, int, list[str]]:
    """Kill a run at random moments and resume it until it finishes; compare it with the uninterrupted run.

    Returns:
        (kills, whether the run was finished and compared (0 or 1), errors).
    """
    draw, config = random.Random(seed), busy_config(folder, f"chain-{seed}")
    run = folder / "runs" / f"chain-{seed}"
    step, done, wrong = 0, 0, []
    for killed in range(kills + 1):
        after = draw.uniform(0, longest) if killed < kills else 600.0
        finished, step, failures = kill_once(config, after, step)
        wrong += [f"seed {seed}, kill {killed}: {failure}" for failure in failures]
        if finished:
            wrong += [f"seed {seed}: {what}" for what in (*outcome(run).differences(expected), *leftovers(run))]
            done = 1
            break
    shutil.rmtree(run, ignore_errors=True)
    return killed, done, wrong


# Every call of a save and prune.


def toy_model(step: int) -> GPT:
    """Return a model whose weights are a function of the step."""
    torch.manual_seed(step)
    return GPT(GPTConfig(preset="llama", vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=4))


def save(run: Path, step: int) -> None:
    """Save a checkpoint as training saves a new best one, write best.json, and prune."""
    model = toy_model(step)
    moments = {f"exp_avg/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    state = {"step": step, "seconds": 1.0}
    folder = run / "checkpoints" / f"step-{step:08d}"
    save_checkpoint(folder, model, ByteTokenizer(), train_config={"seed": 1}, state=state, state_tensors=moments)
    prune(run, KEEP, best=step - 1)
    record_best(run, Best(step, 1 / step))
    prune(run, KEEP, best=step)


CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir")
_watcher: Callable[[str, tuple], None] | None = None
_hooked = False


@contextlib.contextmanager
def watching(watcher: Callable[[str, tuple], None]) -> Iterator[None]:
    """Context manager: call `watcher` before each file system call; it may raise an error or end the process.

    It sees Python's audit events, os.fsync, and the writing of a safetensors file (before and half-way).
    """
    global _watcher, _hooked
    if not _hooked:
        sys.addaudithook(lambda event, details: _watcher(event, details) if _watcher and event in CALLS else None)
        _hooked = True
    real_sync, real_write = os.fsync, safetensors.torch.save_file

    def fsync(descriptor: int) -> None:
        watcher("fsync", (descriptor,))
        real_sync(descriptor)

    def save_file(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        watcher("write", (path,))
        real_write(tensors, path, metadata=metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        watcher("written half", (path,))
        path.write_bytes(whole)

    os.fsync, safetensors.torch.save_file, _watcher = fsync, save_file, watcher
    try:
        yield
    finally:
        os.fsync, safetensors.torch.save_file, _watcher = real_sync, real_write, None


def calls_of(run: Path, step: int) -> int:
    """Count the file system calls of a save and prune."""
    counted: list[str] = []
    with watching(lambda event, details: counted.append(event)):
        save(run, step)
    return len(counted)


def fail_at(call: int, run: Path, step: int, how: int | str) -> int:
    """Save and prune in a child whose `call`-th call (from 0) fails with an errno or kills the process ("kill").

    Returns the exit code of the child.
    """
    made = -1

    def watcher(event: str, details: tuple) -> None:
        nonlocal made
        made += 1
        if made == call:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(how, os.strerror(int(how)))

    def work() -> None:
        with watching(watcher):
            save(run, step)

    return in_child(work)


def check_after(run: Path, code: int, step: int) -> list[str]:
    """Check a run after a save of `step` with an injected fault; return errors.

    The newest valid checkpoint must be that of `step` or the one before; after exit code 0 it must be that of `step`.
    The next save must work and clean up.
    """
    wrong = []
    newest = newest_valid(run)
    names = [f"step-{step:08d}", f"step-{step - 1:08d}"]
    if newest is None or newest.name not in names[: 1 if code == 0 else 2]:
        wrong.append(f"exit code {code}, and the newest is {newest}")
    elif (newest / "training_state.json").read_text().find(f'"step": {int(newest.name[5:])},') < 0:
        wrong.append(f"{newest} holds another step")
    best = read_best(run)
    chosen = best_or_newest(run)
    if best is None or chosen is None or chosen.name not in names or chosen.name != f"step-{best.step:08d}":
        wrong.append(f"exit code {code}, and the best is {best} in {chosen}")
    save(run, step + 1)
    if newest_valid(run) != run / "checkpoints" / f"step-{step + 1:08d}":
        wrong.append("the save after it is not the newest")
    whole = [path for path in checkpoints_of(run) if not refused(partial(verify, path))]
    if len(whole) != KEEP or list((run / "checkpoints").glob(".*")):
        wrong.append(f"left behind: {sorted(path.name for path in (run / 'checkpoints').iterdir())}")
    return wrong


def every_call(folder: Path, how: int | str, calls: Sequence[int] | None = None) -> tuple[int, list[str]]:
    """Inject a fault at each call of a save and prune, one trial per call.

    Returns:
        (trials, errors).
    """
    whole = folder / "whole"
    for step in (1, 2):
        save(whole, step)
    shutil.copytree(whole, folder / "counted")
    calls = calls or range(calls_of(folder / "counted", 3))
    wrong: list[str] = []
    for call in calls:
        run = folder / f"call-{call}"
        shutil.copytree(whole, run)
        code = fail_at(call, run, 3, how)
        wrong += [f"call {call} ({how}): {what}" for what in check_after(run, code, 3)]
        shutil.rmtree(run)
    return len(calls), wrong


def refused(work: Callable[[], object]) -> bool:
    """Whether the reader detected the damage, that is, raised an exception."""
    try:
        work()
    except Exception:  # any exception counts as detected
        return True
    return False
