"""Processors that bend the distribution by its own shape, each row by its own: all tokens stay possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.sampling.processors import NEVER, Context, Parameter
from minigpt.sampling.rules import NOT_NEGATIVE, POSITIVE, Rule, check_numbers, is_number

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
        temperature, spread, exponent = (
            torch.as_tensor(context.column(parameter), dtype=torch.float64, device=logits.device)
            for parameter in (self.temperature, self.spread, self.exponent)
        )
        entropy = torch.special.entr(logits.double().softmax(-1)).sum(-1, keepdim=True)
        count = (logits > NEVER).sum(-1, keepdim=True)
        flatness = (entropy / count.double().log()).clamp(0, 1).nan_to_num(0)
        lowest = (temperature - spread).clamp(min=0)
        # An entropy of 0 may ask for a temperature of 0; at this one too nothing but the likeliest token is left.
        here = (lowest + (temperature + spread - lowest) * flatness**exponent).clamp(min=1e-6)
        return torch.where(count > 1, logits / here.to(logits.dtype), logits)


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
        check_numbers(self, factor=NOT_NEGATIVE, curve=_CURVE)

    def __call__(self, context: Context, logits: Tensor, state: None = None) -> Tensor:
        """The smoothed logits."""
        factor, curve = (
            torch.as_tensor(context.column(parameter), dtype=logits.dtype, device=logits.device)
            for parameter in (self.factor, self.curve)
        )
        top = logits.amax(-1, keepdim=True)
        # So far below, nothing is left of a token; the cube of more would be infinite, and 0 times it no number.
        below = (logits - top).clamp(min=-1e10)
        smooth = top - (3 - curve) / 2 * factor * below**2 + (curve - 1) / 2 * factor * below**3
        return torch.where((factor > 0) & (logits > NEVER), smooth, logits)
