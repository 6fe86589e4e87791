"""Exceptions for users of the library. Each class defines the exit code of the command line.

A message is one line that names the field, file or flag, the value, what was expected and what to do next. The command
line prints only that line; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn


class MinigptError(Exception):
    """Base class of all errors that the user can fix, as opposed to bugs in minigpt."""

    exit_code = 1


class ConfigError(MinigptError, ValueError):
    """Invalid flag, config field or argument."""

    exit_code = 2


class MissingExtra(ConfigError):
    """A package that a feature needs is not installed or cannot be imported.

    Args:
        package: name of the package.
        extra: the extra of minigpt that installs it; "" for a package that every installation has.
        purpose: what needs the package: a flag, a file.
        cause: the exception that the import raised.
    """

    def __init__(self, package: str, extra: str, purpose: str, cause: Exception | None = None) -> None:
        absent = cause is None or (isinstance(cause, ModuleNotFoundError) and cause.name == package)
        state = "is not installed" if absent else f"cannot be imported ({' '.join(str(cause).split())})"
        brings = f"'minigpt-lab[{extra}]'" if extra else package
        super().__init__(
            f"{purpose} needs the package '{package}', which {state}; install it with: pip install {brings}"
        )


def imported(package: str, extra: str, purpose: str) -> Any:
    """Import a package and return the module. Raises MissingExtra if the import fails."""
    try:
        return import_module(package)
    except Exception as error:  # importing a broken package can raise any exception
        raise MissingExtra(package, extra, purpose, error) from error


class DataError(MinigptError):
    """Text, token shards or a tokenizer that are missing, modified or invalid."""

    exit_code = 4


class CheckpointError(MinigptError):
    """A checkpoint that is missing, incomplete, modified or incompatible."""

    exit_code = 5


class DiskError(MinigptError):
    """The disk is full, read-only or failing."""

    exit_code = 6


class NonFiniteError(MinigptError):
    """The loss or the gradients stayed NaN or infinite."""

    exit_code = 7


class NotLearning(MinigptError):
    """Gradients are zero, missing or wrong, so the run would not learn anything."""

    exit_code = 7


class DistributedError(MinigptError):
    """Processes of a distributed run failed to start, disagreed, or were lost."""

    exit_code = 8


class MemoryExceeded(MinigptError):
    """The model and batch do not fit in memory."""

    exit_code = 9


class Interrupted(MinigptError):
    """The user or the system asked the run to stop; everything was saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def leave(code: int) -> NoReturn:
    """Exit the process with this code and skip Python's finalization (os._exit).

    For a process of a distributed run, or one that launched others: torch's threads may abort it during finalization.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
