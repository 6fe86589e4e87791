"""How long a person waits before anything happens: `import minigpt` and every `--help`, each in a fresh process.

python benchmarks/startup.py

Median seconds of seven runs, alternating with a bare `python -c pass`, whose time is part of every other.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from minigpt.cli import VERBS

ROOT = Path(__file__).parents[1]


def seconds(*arguments: str) -> float:
    """Wall-clock seconds of one process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - began


def main() -> None:
    """Print one table."""
    commands = {"python -c pass": ["-c", "pass"], "import minigpt": ["-c", "import minigpt"]}
    commands |= {f"minigpt {verb} --help": ["-m", "minigpt", verb, "--help"] for verb in ["", *VERBS]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(7):
        for name, arguments in commands.items():
            times[name].append(seconds(*[part for part in arguments if part]))
    print(f"{'':24}{'median':>9}{'max':>9}{'over bare python':>20}")
    floor = statistics.median(times["python -c pass"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{name:24}{median:8.3f}s{max(taken):8.3f}s{median - floor:19.3f}s")


if __name__ == "__main__":
    main()
