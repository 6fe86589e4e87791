"""Penalties: the logits of tokens that were seen before are lowered (or raised).

Greedy rows obey them. `scope` says which tokens count: the "prompt", the "output" after it, or "both"; `window` takes
only the last n of those; padding never counts. Only the logits of seen tokens are touched. A strength is a number, or
one number for each prompt of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.sampling.processors.processors import NEVER, Context, Parameter
from minigpt.sampling.processors.scope import occurrences, seen
from minigpt.sampling.settings.rules import ADDED, COUNT_OR_NONE, FACTOR, SCOPE, YES_OR_NO, check, check_numbers


@dataclass(frozen=True)
class RepetitionPenalty:
    """z / penalty where z >= 0, else z * penalty, once for each distinct token seen (Keskar et al., 2019, 1909.05858).

    Above 1 discourages, below 1 encourages, 1 is off. The zero of logits means nothing, so this depends on where the
    model puts it; `normalised` acts on log-probabilities instead (always ln p * penalty), which a shift of all logits
    leaves alone.
    """

    penalty: Parameter
    scope: str = "both"
    window: int | None = None
    normalised: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, penalty=FACTOR)
        check(self, scope=SCOPE, window=COUNT_OR_NONE, normalised=YES_OR_NO)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with those of seen tokens scaled."""
        ids, present = seen(context, self.scope, self.window)
        z = logits.gather(1, ids)
        if self.normalised:
            excess = torch.as_tensor(context.column(self.penalty), dtype=torch.float64, device=z.device) - 1
            # ln p * penalty with the row's own zero put back: the unseen tokens stay as they are.
            log_p = z - logits.logsumexp(-1, keepdim=True)
            scaled = torch.where(z > NEVER, z + excess.to(z.dtype) * log_p, z)
        else:
            penalty = context.column(self.penalty, z.dtype)
            scaled = torch.where(z < 0, z * penalty, z / penalty)
        return logits.scatter(1, ids, torch.where(present, scaled, z))


@dataclass(frozen=True)
class PromptRepetitionPenalty:
    """The repetition penalty with 1 / penalty on the prompt's tokens: above 1 keeps the text close to the prompt.

    transformers calls it encoder_repetition_penalty.
    """

    penalty: Parameter

    def __post_init__(self) -> None:
        check_numbers(self, penalty=FACTOR)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with those of the prompt's tokens scaled."""
        inverse = tuple(1 / p for p in self.penalty) if isinstance(self.penalty, tuple) else 1 / self.penalty
        return RepetitionPenalty(inverse, "prompt")(context, logits)


@dataclass(frozen=True)
class _Subtracted:
    penalty: Parameter
    scope: str = "output"
    window: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, penalty=ADDED)
        check(self, scope=SCOPE, window=COUNT_OR_NONE)


@dataclass(frozen=True)
class PresencePenalty(_Subtracted):
    """z - penalty for each token seen, however often (OpenAI's API, which counts the output alone); 0 is off."""

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with those of seen tokens lowered."""
        ids, present = seen(context, self.scope, self.window)
        lowered = logits.gather(1, ids) - context.column(self.penalty, logits.dtype) * present.to(logits.dtype)
        return logits.scatter(1, ids, lowered)


@dataclass(frozen=True)
class FrequencyPenalty(_Subtracted):
    """z - penalty * count for each token seen count times (OpenAI's API, which counts the output alone); 0 is off."""

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits with those of seen tokens lowered by how often they were."""
        counts = occurrences(context, self.scope, self.window, logits)
        return logits - counts.mul_(context.column(self.penalty, logits.dtype))
