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
    """What every table of results states: versions, number format, instructions and threads."""
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {precision}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


@dataclass(frozen=True)
class Outcome:
    """One run. Seconds count from the first step on: compilation, validations and saves included."""

    start_up: float
    """Seconds from the start of the process to the first step, with leaving it."""
    steps: int
    """Steps taken."""
    seconds: float
    """Seconds to the last validation's end."""
    step_seconds: float
    """Seconds of a step, validations and saves left out: the median of the metrics rows' own."""
    curve: list[tuple[int, float, float]]
    """(step, seconds, loss on the whole validation split), by validation."""
    training: list[tuple[float, float]]
    """(seconds, training loss), by logged step."""
    precision: str
    """trainer.precision, as the run settled it."""

    @property
    def best(self) -> float:
        """The lowest validation loss."""
        return min(loss for _, _, loss in self.curve)

    def seconds_to(self, target: float) -> float:
        """Seconds until the end of the first validation at or below the target; infinite where none is."""
        return next((seconds for _, seconds, loss in self.curve if loss <= target), float("inf"))


def run(config: str, text: Path, *flags: str) -> Outcome:
    """Train `train.py --config CONFIG` on a text, in a folder that is thrown away, with the compiler's cache empty."""
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
