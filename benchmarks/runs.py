"""Shared code of the training benchmarks: run train.py in a separate process and read its metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[1]


def machine(precision: str) -> str:
    """Describe the machine for a table of results: torch version, precision, CPU capability and threads."""
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {precision}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


@dataclass(frozen=True)
class Outcome:
    """Results of one run. Seconds count from the first step and include compilation, validations and saves."""

    start_up: float
    """Seconds from the start of the process to the first step, plus those for exiting."""
    steps: int
    """Steps taken."""
    seconds: float
    """Seconds until the end of the last validation."""
    step_seconds: float
    """Median seconds per step in metrics.jsonl, without validations and saves."""
    curve: list[tuple[int, float, float]]
    """(step, seconds, loss on the whole validation split) of each validation."""
    training: list[tuple[float, float]]
    """(seconds, training loss) of each logged step."""
    precision: str
    """trainer.precision that the run used."""

    @property
    def best(self) -> float:
        """The lowest validation loss."""
        return min(loss for _, _, loss in self.curve)

    def seconds_to(self, target: float) -> float:
        """Seconds until the end of the first validation at or below the target; infinity if there is none."""
        return next((seconds for _, seconds, loss in self.curve if loss <= target), float("inf"))


def run(config: str, text: Path, *flags: str) -> Outcome:
    """Run `train.py --config CONFIG` on a text in a temporary folder, with an empty compiler cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", config, "--runs_dir", folder, "--run_name", "run"]
        command += [
            "--data.source",
            str(text),
            "--data.folder",
            f"{folder}/data",
            "--sample.max_new_tokens",
            "0",
            *flags,
        ]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        whole = time.monotonic() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        precision = yaml.safe_load((Path(folder) / "run/config.yaml").read_text())["trainer"]["precision"]
    rows = [json.loads(line) for line in lines]
    curve = [(row["step"], row["seconds"], row["val/loss"]) for row in rows if "val/loss" in row]
    training = [(row["seconds"], row["train/loss"]) for row in rows if "train/loss" in row]
    rates = sorted(
        (row["tokens"] / row["step"]) / row["tokens_per_second"] for row in rows if "tokens_per_second" in row
    )
    steps, seconds, _ = curve[-1]
    return Outcome(whole - seconds, steps, seconds, rates[len(rates) // 2], curve, training, precision)
