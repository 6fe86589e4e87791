"""The processor protocol, its context, and the simplest processors.

A processor is called as (context, logits, state) with (B, V) float32 logits and returns new logits; it never changes
its input, and a token it forbids gets -inf. Its parameters are a number, or one number for each prompt of the call.
What else it may have:

    shaping = True                     greedy rows skip it: it bends the distribution, but neither forbids nor prefers
    greedy(context) -> list[bool]      which rows take the likeliest token instead of drawing one
    start(context) -> state            with memory: the state before the first token
    accept(state, tokens, raw, processed) -> state      with memory: the state after a token; see `Remembering`

A state is an immutable tree (tuples and dicts) of tensors and numpy arrays whose first axis is the row. The loop alone
gathers rows and goes back to an earlier state; a processor does neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.sampling.draws.noise import Noise
from minigpt.sampling.settings.config import check_field

NEVER = float("-inf")

Parameter = float | tuple[float, ...]  # one for all, or one for each prompt


@dataclass(frozen=True, eq=False)
class Context:
    """What a processor may look at: B rows, about to choose the token at position lengths[b] of each row b."""

    ids: Tensor
    """All tokens so far, prompt and written ones: (B, L) int64, right-padded. The next step may reuse its memory."""
    prompt_lengths: Tensor
    """Tokens of each prompt: (B,) int64."""
    lengths: Tensor
    """Real tokens in each row of `ids`: (B,) int64."""
    positions: np.ndarray
    """`lengths` on the host, (B,) int64."""
    rows: tuple[int, ...]
    """The number of the prompt that each row continues: B numbers."""
    end_ids: tuple[int, ...]
    """The tokens that end a row."""
    noise: Noise
    """The rows' own noise; use `uniform`."""

    def each(self, parameter: Parameter) -> list[float]:
        """A parameter's number for each row.

        Raises:
            ConfigError: it has fewer numbers than the call has prompts.
        """
        if not isinstance(parameter, tuple):
            return [parameter] * len(self.rows)
        if max(self.rows) >= len(parameter):
            raise ConfigError(
                f"sampling: a processor's parameter {parameter} has {len(parameter)} numbers; "
                f"expected one for each prompt, and there is a prompt {max(self.rows)} (counted from 0)"
            )
        return [parameter[row] for row in self.rows]

    def column(self, parameter: Parameter, dtype: torch.dtype = torch.float64) -> Any:
        """A parameter as it combines with (B, V): a number as it is, one per prompt as (B, 1)."""
        if not isinstance(parameter, tuple):
            return parameter
        return torch.tensor(self.each(parameter), dtype=dtype, device=self.ids.device).unsqueeze(1)

    def uniform(self, purpose: int, draw: int = 0) -> Tensor:
        """One random number per row for this position, in [0, 1): (B,) float64."""
        return torch.from_numpy(self.noise.uniform(self.positions, purpose, draw)).to(self.ids.device)


class Processor(Protocol):
    """(context, logits, state) -> logits. A plain function (context, logits) -> logits does as well."""

    def __call__(self, context: Context, logits: Tensor, state: Any = None) -> Tensor:
        """New (B, V) logits; the given ones stay as they are."""


class Remembering(Processor, Protocol):
    """A processor with memory."""

    def start(self, context: Context) -> Any:
        """The state before the first token: the context holds the prompts."""

    def accept(self, state: Any, tokens: Tensor, raw: Tensor, processed: Tensor) -> Any:
        """The state after the chosen tokens (B,), given the model's and the final probabilities, (B, V) each."""


class Filter:
    """A processor that changes no logit but to -inf. `minigpt.sampling.settings.shape` gives it a field.

    Its docstring is its row in docs/sampling.md: what it does, then `Source:` and `When:`.
    """

    shaping: ClassVar[bool] = True


def numbers(field: str, value: Any) -> Any:
    """A processor's parameter, checked: a number, or (from any sequence, array or tensor) a tuple of one per prompt."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    several = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    for number in (value,) if several is None else several:
        if number is None:
            raise ConfigError(f"sampling: {field} is None; expected a number, or one for each prompt")
        check_field(field, number)
    return value if several is None else several


@dataclass(frozen=True)
class AllowedVocabulary:
    """Forbid ids from `size` on: a model's vocabulary is often padded beyond its tokenizer's."""

    size: int

    def __call__(self, context: Context, logits: Tensor, state: Any = None) -> Tensor:
        """Logits with -inf from id `size` on."""
        return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= self.size, NEVER)


@dataclass(frozen=True)
class Temperature:
    """z / T: below 1 sharpens the distribution, above 1 flattens it; a row at T = 0 is greedy."""

    temperature: Parameter
    shaping: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", numbers("temperature", self.temperature))

    def greedy(self, context: Context) -> list[bool]:
        """Which rows have temperature 0."""
        return [temperature == 0 for temperature in context.each(self.temperature)]

    def __call__(self, context: Context, logits: Tensor, state: Any = None) -> Tensor:
        """Logits divided by the temperature; those of greedy rows as they are."""
        temperature = context.column(self.temperature, logits.dtype)
        return logits / (temperature + (temperature == 0))


@dataclass(frozen=True)
class Normalised:
    """Logits shifted to be log-probabilities, of which a search adds up those of a text (renormalize_logits)."""

    def __call__(self, context: Context, logits: Tensor, state: Any = None) -> Tensor:
        """The log-softmax; a row without a possible token as it is."""
        total = logits.logsumexp(-1, keepdim=True)
        return torch.where(total > NEVER, logits - total, logits)


@dataclass(frozen=True)
class Plain:
    """A user's function (context, logits) -> logits as a processor; it gets a copy, so it may write into its logits."""

    function: Callable[[Context, Tensor], Tensor]

    def __call__(self, context: Context, logits: Tensor, state: Any = None) -> Tensor:
        """The function's answer."""
        return self.function(context, logits.clone())


@dataclass(frozen=True)
class Foreign:
    """A LogitsProcessor of transformers, called as (input_ids, scores). Rows of different length are called one by one,
    as input_ids holds no padding.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, context: Context, logits: Tensor, state: Any = None) -> Tensor:
        """The processor's scores."""
        lengths = context.positions.tolist()
        if len(set(lengths)) == 1:
            return self.function(context.ids[:, : lengths[0]], logits.clone())
        rows = [
            self.function(context.ids[row : row + 1, :length], logits[row : row + 1].clone())
            for row, length in enumerate(lengths)
        ]
        return torch.cat(rows)
