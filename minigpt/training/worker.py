"""A worker process of multi-process training: `python -m minigpt.training.worker JOB`, started by launch.py."""

from __future__ import annotations

import json
import os
import sys

from minigpt.errors import Interrupted, MinigptError, leave
from minigpt.terminal import notice
from minigpt.training.run.fit import fit
from minigpt.training.run.settle import Job


def main(job: str) -> int:
    """Train the job given as JSON. Returns the exit code and prints the error if it is not 0."""
    try:
        fit(Job.from_dict(json.loads(job)))
    except Interrupted as error:
        return error.exit_code  # the launcher prints the message once
    except MinigptError as error:
        notice(f"process {os.environ.get('RANK')}: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1]))
