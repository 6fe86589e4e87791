"""What the parameters of processors accept, checked when a processor is made.

Imports nothing heavy, so that a config may use the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NamedTuple

from minigpt.errors import ConfigError


class Rule(NamedTuple):
    """Which values a parameter accepts, and what to write instead of others."""

    accepts: Callable[[Any], bool]
    expected: str


def is_number(value: object) -> bool:
    """Whether the value is a finite number (True and False are none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether the value is a whole number, 3.0 included."""
    return is_number(value) and value == int(value)  # type: ignore[call-overload]


def is_id(value: object) -> bool:
    """Whether the value can be a token id."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


NUMBER = Rule(is_number, "a number")
POSITIVE = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and v >= 0, "a number, 0 or more")
FRACTION = Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
POSITIVE_FRACTION = Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, at most 1")
BELOW_ONE = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
AT_LEAST_ONE = Rule(lambda v: is_number(v) and v >= 1, "a number, 1 or more")
COUNT = Rule(lambda v: is_whole(v) and v >= 1, "a whole number, 1 or more")
COUNT_OR_ZERO = Rule(lambda v: is_whole(v) and v >= 0, "a whole number, 0 or more")
COUNT_OR_NONE = Rule(lambda v: v is None or COUNT.accepts(v), "a whole number, 1 or more, or None for no limit")
SCOPE = Rule(lambda v: v in ("prompt", "output", "both"), "'prompt', 'output' or 'both'")
YES_OR_NO = Rule(lambda v: isinstance(v, bool), "True or False")
BIAS = Rule(lambda v: is_number(v) or v == -math.inf, "a number, or minus infinity to forbid")
FUNCTION = Rule(callable, "a function")


def check(processor: Any, **rules: Rule) -> None:
    """Check fields that hold one value.

    Raises:
        ConfigError: naming the processor, the field, its value and what was expected.
    """
    for name, rule in rules.items():
        _accept(processor, name, getattr(processor, name), rule)


def check_numbers(processor: Any, **rules: Rule) -> None:
    """Check fields that hold a number, or in any sequence, array or tensor one for each prompt, kept as a tuple.

    Raises:
        ConfigError: naming the processor, the field, the number and what was expected.
    """
    for name, rule in rules.items():
        value = getattr(processor, name)
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            value = tuple(value)
        for number in value if isinstance(value, tuple) else (value,):
            _accept(processor, name, number, rule)
        object.__setattr__(processor, name, value)


def token_ids(processor: Any, name: str, value: Any) -> tuple[int, ...]:
    """A token id or several as a tuple of at least one.

    Raises:
        ConfigError: there is none, or one that is no id.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,)
    if not ids or not all(map(is_id, ids)):
        raise ConfigError(
            f"sampling: {type(processor).__name__}'s {name} is {value!r}; expected a token id (0 or more), or several"
        )
    return tuple(map(int, ids))


def check_vocabulary(processor: Any, largest: int, size: int) -> None:
    """Raise ConfigError if a processor names a token that a vocabulary of this size does not have."""
    if largest >= size:
        raise ConfigError(
            f"sampling: {type(processor).__name__} names token {largest}; expected an id below the model's vocabulary "
            f"size of {size}"
        )


def _accept(processor: Any, name: str, value: Any, rule: Rule) -> None:
    if not rule.accepts(value):
        raise ConfigError(f"sampling: {type(processor).__name__}'s {name} is {value!r}; expected {rule.expected}")
