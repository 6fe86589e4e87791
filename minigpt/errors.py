"""Errors for the user. Each class has the exit code of the command line.

A message is one line that names the field, file or flag, the value, what was expected and what to do next. The command
line prints only that line; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn


class MinigptError(Exception):
    """Base of all errors that the user can fix."""

    exit_code = 1


class ConfigError(MinigptError, ValueError):
    """An invalid flag, config field or argument."""

    exit_code = 2


class MissingExtra(ConfigError):
    """A package that a feature needs is not installed or fails to import.

    Args:
        package: its name.
        extra: the extra of minigpt-lab that installs it; "" if every installation has it.
        purpose: what needs it, such as a flag or a file.
        cause: the exception that its import raised.
    """

    def __init__(self, package: str, extra: str, purpose: str, cause: Exception | None = None) -> None:
        absent = cause is None or (isinstance(cause, ModuleNotFoundError) and cause.name == package)
        state = "is not installed" if absent else f"cannot be imported ({' '.join(str(cause).split())})"
        brings = f"'minigpt-lab[{extra}]'" if extra else package
        super().__init__(
            f"{purpose} needs the package '{package}', which {state}; install it with: pip install {brings}"
        )


def imported(package: str, extra: str, purpose: str) -> Any:
    """Import a module by name. Raises MissingExtra if it cannot be imported."""
    try:
        return import_module(package)
    except Exception as error:  # a broken package can raise anything
        raise MissingExtra(package, extra, purpose, error) from error


class DataError(MinigptError):
    """Text, token shards or a tokenizer that are missing, altered or unsuitable."""

    exit_code = 4


class CheckpointError(MinigptError):
    """A checkpoint that is missing, incomplete, altered or does not fit."""

    exit_code = 5


class DiskError(MinigptError):
    """The disk is full, read-only or failing."""

    exit_code = 6


class NonFiniteError(MinigptError):
    """The loss or the gradients stayed NaN or infinite."""

    exit_code = 7


class NotLearning(MinigptError):
    """Gradients are zero, missing or wrong, so the run would learn nothing."""

    exit_code = 7


class DistributedError(MinigptError):
    """Processes could not be started, disagreed, or were lost."""

    exit_code = 8


class MemoryExceeded(MinigptError):
    """The model and batch do not fit in memory."""

    exit_code = 9


class Interrupted(MinigptError):
    """A stop was requested by a signal; everything was saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def leave(code: int) -> NoReturn:
    """Exit the process with this code, without running interpreter shutdown.

    For a process that was one of several or launched several: torch's threads can abort it during shutdown.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
