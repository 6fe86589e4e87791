"""Fault injection for training: kills, failing system calls, power cuts, full disks, damaged files.

    python benchmarks/faults.py                                      all parts, few trials: minutes
    python benchmarks/faults.py --kills 300 --pairs 20 --flips 1000  the figures in docs/reliability.md

Prints every failure. In the first three parts, a failure is any of: the newest checkpoint does not verify, a run loses
steps that it had saved, temporary files are left, or a finished run differs from the uninterrupted one in a single bit
of its losses, validations, samples, weights or optimizer state. If none of N trials failed, the failure rate is below
3/N (95 %).
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from fault_disks import checkpoint_damage, corpus_damage, full_disk_run, may_mount, power_cuts, small_disk, small_files
from fault_trials import Outcome, busy_config, chain, check_after, every_call, in_child, outcome, save, start
from fault_trials import wait as wait_for
from minigpt.checkpoint.runs import newest_valid
from minigpt.training.launch import train

ROOT = Path(__file__).parents[1]
Row = tuple[str, int, list[str]]


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for one part."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield Path(folder)


def reference(folder: Path, devices: int = 1) -> tuple[Outcome, float]:
    """Train without any fault; return the results and the seconds it took."""
    began = time.monotonic()
    if devices == 1:
        code = in_child(lambda: train(busy_config(folder, "reference")))
    else:
        code = launch(folder, "reference", devices).wait()
    if code != 0:
        raise SystemExit(f"the uninterrupted run failed with exit code {code}")
    return outcome(folder / "runs/reference"), time.monotonic() - began


def kills(wanted: int, seed: int) -> Iterator[Row]:
    """Kill a run in one process at random moments until it finishes; repeat with further runs."""
    with scratch() as folder:
        expected, seconds = reference(folder)
        killed, finished, wrong = 0, 0, []
        while killed < wanted:
            more, done, failures = chain(folder, expected, seconds * 0.8, min(20, wanted - killed), seed)
            killed, finished, wrong, seed = killed + more, finished + done, wrong + failures, seed + 1
        yield f"SIGKILL at a random moment, one process ({finished} runs finished and compared)", killed, wrong


def launch(folder: Path, name: str, devices: int) -> subprocess.Popen:
    """Start the run from the command line, with several processes, in a new process session."""
    config = busy_config(folder, name, devices=devices)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(file)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)


def workers_of(process: int) -> list[int]:
    """Return the process ids of the workers that a launcher started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(child) for child in children if b"minigpt.training.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def pair_kills(wanted: int, seed: int) -> Iterator[Row]:
    """Train with two processes; at a random moment kill one of them, or both and the launcher."""
    with scratch() as folder:
        expected, seconds = reference(folder, devices=2)
        draw, killed, name, wrong, step = random.Random(seed), 0, 0, [], 0
        finished = 0
        while killed < wanted or step:
            began, process = time.monotonic(), launch(folder, f"pair-{name}", 2)
            if killed < wanted:
                deadline = time.monotonic() + draw.uniform(0.2, 0.9) * seconds
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                if process.poll() is None:
                    workers = workers_of(process.pid)
                    victim = draw.choice(["all", "first", "last"]) if workers else "all"
                    if victim == "all":
                        for each in (process.pid, *workers):  # each worker has its own session
                            os.kill(each, signal.SIGKILL)
                    else:
                        os.kill(workers[0 if victim == "first" else -1], signal.SIGKILL)
                    killed += 1
            code = process.wait()
            run = folder / f"runs/pair-{name}"
            newest = newest_valid(run, wrong.append)
            now = int(newest.name.removeprefix("step-")) if newest else 0
            if now < step:
                wrong.append(f"pair {name}: step {step} was saved, now the newest is {now}")
            step = now
            if code == 0:
                wrong += [f"pair {name}: {what}" for what in outcome(run).differences(expected)]
                name, step, finished = name + 1, 0, finished + 1
                seconds = min(seconds, time.monotonic() - began)
            elif code not in (8, -signal.SIGKILL):
                wrong.append(f"pair {name}: exit code {code}")
        yield f"SIGKILL at a random moment, two processes ({finished} runs finished and compared)", killed, wrong


def calls() -> Iterator[Row]:
    """Inject a kill or an error at every call of a save and prune."""
    for what, how in (("SIGKILL", "kill"), ("EIO", errno.EIO), ("ENOSPC", errno.ENOSPC)):
        with scratch() as folder:
            yield f"{what} at each call of a save and prune", *every_call(folder, how)
    if shutil.which("strace"):
        yield from system_calls()
    with scratch() as folder:
        yield "power failure before each call; unsynced data is lost", *power_cuts(folder)


TRACED = ("openat", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir", "mkdir")


def system_calls() -> Iterator[Row]:
    """Inject a kill or an error at every system call of a save and prune, with strace."""
    for what, inject in (("SIGKILL", "signal=SIGKILL"), ("EIO", "error=EIO"), ("ENOSPC", "error=ENOSPC")):
        with scratch() as folder:
            trials, wrong = 0, []
            for step in (1, 2):
                save(folder / "whole", step)
            for kind in TRACED:
                for call in itertools.count(1):
                    shutil.copytree(folder / "whole", folder / "run")
                    code, reached = traced_save(folder / "run", kind, f"{inject}:when={call}")
                    if code is None:
                        return  # no permission to trace
                    failures = check_after(folder / "run", code, 3)
                    wrong += [f"{kind} number {call} ({what}): {failure}" for failure in failures]
                    shutil.rmtree(folder / "run")
                    trials += reached
                    if not reached:
                        break
            yield f"{what} at each system call of a save and prune (strace)", trials, wrong


def traced_save(run: Path, kind: str, inject: str) -> tuple[int | None, bool]:
    """Save in a child under strace. Returns (exit code, or None without permission; whether the fault was injected)."""
    ready, go = os.pipe(), os.pipe()

    def work() -> None:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        save(run, 3)

    child = start(work)
    os.read(ready[0], 1)
    log = run.parent / "strace.log"
    command = ["strace", "-f", "-p", str(child), "-o", str(log), "-e", f"trace={kind}", "-e", f"inject={kind}:{inject}"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    attached = "attached" in tracer.stderr.readline()
    os.write(go[1], b"x")
    code = wait_for(child)
    tracer.communicate()
    for descriptor in (*ready, *go):
        os.close(descriptor)
    told = log.read_text() if log.is_file() else ""
    return (code if attached else None), "INJECTED" in told or "killed by SIGKILL" in told


def disks() -> Iterator[Row]:
    """Test full file systems of every size from almost none to enough, and file size limits."""
    with scratch() as folder:
        if may_mount(folder):
            ends = [small_disk(fresh(folder, "disk"), size) for size in range(4096, 1 << 17, 4096)]
            yield f"full disk, {ends.count('full')} of them full", len(ends), [e for e in ends if e not in _FINE]
            expected, _ = reference(folder)
            sizes = range(150_000, 650_000, 50_000)
            wrong = [each for size in sizes for each in full_disk_run(fresh(folder, f"run-{size}"), size, expected)]
            yield "full disk during a run; the disk is then enlarged and the run resumed", len(sizes), wrong
        sizes = range(0, 20_000, 500)
        ends = [small_files(fresh(folder, "limit"), size) for size in sizes]
        yield (
            f"file size limit, {ends.count('full')} of them reached",
            len(ends),
            [e for e in ends if e not in _FINE],
        )


_FINE = ("full", "fits")


def fresh(folder: Path, name: str) -> Path:
    """Create an empty folder with this name."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    return folder / name


def damage(flips: int) -> Iterator[Row]:
    """Flip bits and truncate files, one at a time; undetected damage is a failure."""
    with scratch() as folder:
        for what, (trials, missed) in checkpoint_damage(folder, flips).items():
            yield f"a flipped bit or a truncation: {what}", trials, missed
        yield "a flipped bit or a truncation: a corpus, verified", *corpus_damage(folder, flips)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills of runs with one process")
    parser.add_argument("--pairs", type=int, default=2, help="number of kills of runs with two processes")
    parser.add_argument(
        "--flips", type=int, default=200, help="number of flipped bits, over all files of a checkpoint and of a corpus"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["kills", "pairs", "calls", "disks", "damage"], help="run only this part")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads would make forking unsafe
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "kills": lambda: kills(options.kills, options.seed),
        "pairs": lambda: pair_kills(options.pairs, options.seed),
        "calls": calls,
        "disks": disks,
        "damage": lambda: damage(options.flips),
    }
    began = time.monotonic()
    print(f"{'what':78} {'trials':>7} {'failures':>8} {'minutes':>8}")
    details = []
    for name, part in parts.items():
        if options.only not in (None, name):
            continue
        mark = time.monotonic()
        for what, trials, wrong in part():
            minutes, mark = (time.monotonic() - mark) / 60, time.monotonic()
            print(f"{what:78} {trials:7,} {len(wrong):8,} {minutes:8.1f}", flush=True)
            details += [] if "control" in what else [f"{what}: {each}" for each in wrong]
    print(f"{(time.monotonic() - began) / 3600:.2f} hours")
    print(*details[:50], sep="\n")
    sys.exit(bool(details))


if __name__ == "__main__":
    main()
