"""A list of processors as one: in order, each with its own state; greedy rows skip shaping."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.sampling.draws.choice import is_choosable
from minigpt.sampling.processors.processors import Context, Foreign, Plain, Processor

FOREIGN = ("LogitsProcessor", "LogitsProcessorList")  # classes of transformers


class Pipeline:
    """Processors in the order in which they are applied. The pipeline's state is the tuple of their states.

    Args:
        processors: processors, or plain functions (context, logits) -> logits.

    Raises:
        ConfigError: one of them cannot be called with two or three arguments.
    """

    def __init__(self, processors: Sequence[Processor | Callable[[Context, Tensor], Tensor]] = ()) -> None:
        self.processors: tuple[Any, ...] = tuple(_as_processor(processor) for processor in processors)
        self.remembers = any(hasattr(processor, "accept") for processor in self.processors)

    def greedy(self, context: Context) -> list[bool]:
        """Which rows take the most likely token: those that any processor declares greedy."""
        votes = [processor.greedy(context) for processor in self.processors if hasattr(processor, "greedy")]
        return [any(row) for row in zip(*votes, strict=True)] if votes else [False] * len(context.rows)

    def start(self, context: Context) -> tuple[Any, ...]:
        """Each processor's state before the first token; None for processors without a state."""
        return tuple(processor.start(context) if hasattr(processor, "start") else None for processor in self.processors)

    def __call__(
        self,
        context: Context,
        logits: Tensor,
        states: tuple[Any, ...] | None = None,
        greedy: list[bool] | None = None,
    ) -> Tensor:
        """Apply every processor to the logits: (B, V) float32 in and out."""
        after = logits
        for _, after in self.stages(context, logits, states, greedy):  # noqa: B007 - the last one is the result
            pass
        return after

    def stages(
        self,
        context: Context,
        logits: Tensor,
        states: tuple[Any, ...] | None = None,
        greedy: list[bool] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, logits): the model's logits first, then the logits after each processor that is applied.

        `greedy` says which rows skip the processors that shape; None: the rows that the processors declare greedy.
        """
        yield "model", logits
        greedy = self.greedy(context) if greedy is None else greedy
        for processor, state in zip(self.processors, states or [None] * len(self.processors), strict=True):
            if not (getattr(processor, "shaping", False) and all(greedy)):
                logits = _apply(processor, context, logits, state, greedy)
                yield _name(processor), logits

    def accept(self, states: tuple[Any, ...], tokens: Tensor, raw: Tensor, processed: Tensor) -> tuple[Any, ...]:
        """Update the states with the chosen tokens (B,), the model's logits and the processed logits, (B, V) each."""
        if not self.remembers:
            return states
        raw, processed = raw.softmax(-1), processed.softmax(-1)
        return tuple(
            processor.accept(state, tokens, raw, processed) if hasattr(processor, "accept") else state
            for processor, state in zip(self.processors, states, strict=True)
        )

    def blame(self, context: Context, logits: Tensor, states: tuple[Any, ...] | None, row: int) -> str:
        """Error message for a row with no possible token: the first step whose logits are all -inf, NaN or +inf."""
        place = f"no token for position {context.positions[row]}: "
        for name, stage in self.stages(context, logits, states):
            if is_choosable(stage[row]):
                continue
            if name == "model":
                return f"{place}the model's logits have no finite maximum (NaN, +inf, or -inf everywhere)"
            return f"{place}{name} left no token to choose from"
        return f"{place}the model's logits contain NaN"


def _apply(processor: Any, context: Context, logits: Tensor, state: Any, greedy: list[bool]) -> Tensor:
    """Apply one processor; if it shapes, greedy rows keep their logits."""
    processed = processor(context, logits, state)
    if not isinstance(processed, Tensor) or processed.shape != logits.shape:
        got = f"shape {tuple(processed.shape)}" if isinstance(processed, Tensor) else repr(processed)
        raise ConfigError(
            f"sampling: processor {_name(processor)} returned {got}; expected logits of shape {tuple(logits.shape)}"
        )
    if any(greedy) and getattr(processor, "shaping", False):
        return torch.where(torch.tensor(greedy, device=logits.device).unsqueeze(1), logits, processed)
    return processed


def gather_state(state: Any, rows: Sequence[int]) -> Any:
    """The state tree of a batch whose row i is the current row rows[i].

    Raises:
        TypeError: a leaf is neither None, a tensor nor a numpy array, so it has no row axis.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.index_select(0, torch.tensor(rows, device=state.device))
    if isinstance(state, np.ndarray):
        return state[list(rows)]
    if isinstance(state, dict):
        return {name: gather_state(part, rows) for name, part in state.items()}
    if isinstance(state, tuple):
        parts = [gather_state(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise TypeError(f"a processor's state holds a {type(state).__name__}; expected tensors or arrays with a row axis")


def _as_processor(function: Any) -> Any:
    """Return the function itself if it takes (context, logits, state), wrapped if it takes (context, logits)."""
    if any(kind.__module__.startswith("transformers.") and kind.__name__ in FOREIGN for kind in type(function).__mro__):
        return Foreign(function)
    for count, wrap in ((3, lambda f: f), (2, Plain)):
        try:
            inspect.signature(function).bind(*range(count))
        except (TypeError, ValueError):
            continue
        return wrap(function)
    raise ConfigError(f"sampling: {function!r} is not a processor; expected a function (context, logits) -> logits")


def _name(processor: Any) -> str:
    function = processor.function if isinstance(processor, (Plain, Foreign)) else processor
    return getattr(function, "__name__", type(function).__name__)
