"""The errors a user can meet. Each carries the process exit code that the command line ends with.

A message is one line that names the field, file or flag, the value, what was expected and what to do next. The command
line prints that line alone; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn


class MinigptError(Exception):
    """Base of every error that is the user's to mend rather than ours."""

    exit_code = 1


class ConfigError(MinigptError, ValueError):
    """A flag, a config field or a call's argument that cannot be used as given."""

    exit_code = 2


class MissingExtra(ConfigError):
    """A package that a feature needs is not installed, or does not work.

    Args:
        package: its name.
        extra: the extra of ours that brings it; "" for one that every installation has.
        purpose: what needs it: a flag, a file.
        cause: what importing it raised.
    """

    def __init__(self, package: str, extra: str, purpose: str, cause: Exception | None = None) -> None:
        absent = cause is None or (isinstance(cause, ModuleNotFoundError) and cause.name == package)
        state = "is not installed" if absent else f"cannot be imported ({' '.join(str(cause).split())})"
        brings = f"'minigpt-lab[{extra}]'" if extra else package
        super().__init__(
            f"{purpose} needs the package '{package}', which {state}; install it with: pip install {brings}"
        )


def imported(package: str, extra: str, purpose: str) -> Any:
    """The module of that name. Raises MissingExtra (see there) where it cannot be imported."""
    try:
        return import_module(package)
    except Exception as error:  # a package that is there and broken raises anything
        raise MissingExtra(package, extra, purpose, error) from error


class DataError(MinigptError):
    """Text, token shards or a tokenizer that are missing, altered or unfit."""

    exit_code = 4


class CheckpointError(MinigptError):
    """A checkpoint that is missing, incomplete, altered or made for something else."""

    exit_code = 5


class DiskError(MinigptError):
    """The disk is full, read-only or failing."""

    exit_code = 6


class NonFiniteError(MinigptError):
    """Loss or gradients stayed NaN or infinite."""

    exit_code = 7


class NotLearning(MinigptError):
    """Gradients are zero, missing or wrong: the run would go on without learning anything."""

    exit_code = 7


class DistributedError(MinigptError):
    """Processes could not be started, did not agree, or were lost."""

    exit_code = 8


class MemoryExceeded(MinigptError):
    """The model and batch do not fit in memory."""

    exit_code = 9


class Interrupted(MinigptError):
    """The user or the system asked to stop; everything was saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def leave(code: int) -> NoReturn:
    """End the process with this exit code, without Python's last steps.

    For a process that was one of several or launched several: torch's threads may abort it when the interpreter ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
