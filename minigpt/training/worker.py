"""One of several processes: `python -m minigpt.training.worker RUN CORPUS CHECKPOINT`, started by launch.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from minigpt.errors import MinigptError
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.fit import Job, fit


def main(run: str, corpus: str, start: str) -> int:
    """Train the settled job. Returns the exit code; the error's line is printed by the first process alone."""
    config = TrainConfig.from_dict(yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8")))
    try:
        fit(Job(config, Path(run), Path(corpus), Path(start) if start else None))
    except MinigptError as error:
        if os.environ.get("RANK") == "0" or error.exit_code < 128:
            notice(f"process {os.environ.get('RANK')}: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
