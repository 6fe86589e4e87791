"""Processors that rescale logits; every token stays possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.sampling.processors.processors import Context, Parameter
from minigpt.sampling.processors.ranking import count_possible, mean_logit, only_possible
from minigpt.sampling.settings.rules import FACTOR_OR_ZERO, NOT_NEGATIVE, POSITIVE, Rule, check_numbers, is_number

# The weights of d^2 and d^3 in `QuadraticSmoothing` have the signs that keep the order of the tokens only here.
_CURVE = Rule(lambda v: is_number(v) and 1 <= v <= 3, "a number from 1 to 3")


@dataclass(frozen=True)
class DynamicTemperature:
    """A temperature from T - spread to T + spread, the higher the flatter the distribution (kalomaze, 2024).

    With Tmin = max(0, T - spread) and Tmax = T + spread it is Tmin + (Tmax - Tmin) * (H / ln n)^exponent: H is the
    entropy in nats and n the number of possible tokens. A row with one possible token stays as it is; spread 0 is
    `Temperature(T)`.
    """

    temperature: Parameter
    spread: Parameter
    exponent: Parameter = 1.0
    shaping: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, temperature=POSITIVE, spread=NOT_NEGATIVE, exponent=NOT_NEGATIVE)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """Logits divided by the row's temperature."""
        temperature, spread = context.column(self.temperature), context.column(self.spread)
        p = logits.softmax(-1)
        entropy = -(mean_logit(logits, p) + p.amax(-1, keepdim=True).log()).double()
        count = count_possible(logits).double()
        flatness = (entropy / count.log()).clamp(0, 1).nan_to_num(0)
        lowest = torch.as_tensor(temperature - spread, dtype=torch.float64, device=logits.device).clamp(min=0)
        # An entropy of 0 may ask for a temperature of 0; at this one too nothing but the likeliest token is left.
        here = (lowest + (temperature + spread - lowest) * flatness ** context.column(self.exponent)).clamp(min=1e-6)
        return logits / torch.where(count > 1, here, 1).to(logits.dtype)


@dataclass(frozen=True)
class QuadraticSmoothing:
    """max z - k f d^2 + s f d^3, with d = z - max z, k = (3 - curve) / 2, s = (curve - 1) / 2 (kalomaze, 2024).

    The factor f says how strongly: below about 1 / (the usual distance) it flattens the top and cuts the tail; 0 is
    off. The curve, from 1 (a parabola) to 3, steepens the fall.
    """

    factor: Parameter
    curve: Parameter = 1.0
    shaping: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, factor=FACTOR_OR_ZERO, curve=_CURVE)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """The smoothed logits."""
        factor, curve = context.column(self.factor, logits.dtype), context.column(self.curve, logits.dtype)
        if not isinstance(factor, Tensor) and factor == 0:
            return logits.clone()
        top = logits.amax(-1, keepdim=True)
        # So far below, nothing is left of a token; the cube of more would be infinite, and 0 times it no number.
        below = (logits - top).clamp_(min=-1e10)
        bend = factor * ((curve - 1) / 2 * below - (3 - curve) / 2)
        smooth = only_possible(below.square().mul_(bend).add_(top), logits)
        return torch.where(factor > 0, smooth, logits) if isinstance(factor, Tensor) else smooth
