"""One of several training processes: `python -m minigpt.training.worker JOB`, started by launch.py."""

from __future__ import annotations

import json
import os
import sys

from minigpt.errors import Interrupted, MinigptError, leave
from minigpt.plugins import load_plugins
from minigpt.terminal import notice
from minigpt.training.run.fit import fit
from minigpt.training.run.job import Job


def main(job: str) -> int:
    """Train the resolved job (JSON). Returns the exit code and prints the reason if it is not 0."""
    try:
        values = json.loads(job)
        load_plugins(values.pop("plugins", []))  # what the launcher's process has loaded
        fit(Job.from_dict(values))
    except Interrupted as error:
        return error.exit_code  # the launcher prints the message once for all processes
    except MinigptError as error:
        notice(f"process {os.environ.get('RANK')}: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1]))
