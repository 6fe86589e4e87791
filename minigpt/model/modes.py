"""Evaluation mode, borrowed: dropout is off while a model computes, and its modules get their own modes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import nn

_borrowed: dict[int, list[Any]] = {}
"""id of a model -> [number of users, the modules that were in training mode]; in use, so the id is the model's own."""
_lock = Lock()


@contextmanager
def evaluating(model: Any, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Context manager: every module of the model is in evaluation mode.

    At the end of the last of several users, in several threads, the modules that were in training mode are again. A
    generator must not yield inside: the caller may set another mode, which the end would undo.

    Args:
        model: anything; what is no nn.Module is left alone.
        modules: the list of model.modules(), if the caller has it.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _lock:
        entry = _borrowed.get(id(model))
        if entry is None:
            training = [module for module in modules or model.modules() if module.training]
            entry = _borrowed[id(model)] = [0, training]
            for module in training:
                module.training = False
        entry[0] += 1
    try:
        yield
    finally:
        with _lock:
            entry[0] -= 1
            if not entry[0]:
                del _borrowed[id(model)]
                for module in entry[1]:
                    module.training = True
