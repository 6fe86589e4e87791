"""Which values settings and processor parameters accept. `setting` makes a field, `check` checks an object's fields.

Imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import field
from numbers import Integral, Real
from typing import Any, NamedTuple

from minigpt.errors import ConfigError


class Rule(NamedTuple):
    """Which values a parameter accepts, and how an error message describes them."""

    accepts: Callable[[Any], bool]
    expected: str
    whole: bool = False
    """Whether the value must be a whole number; 3.0 counts as one."""
    wraps: bool = False
    """Whether a string stands for a list of one string."""


def is_number(value: object) -> bool:
    """Whether the value is a finite number (True and False are not numbers)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether the value is a whole number, 3.0 included."""
    return is_number(value) and value == int(value)  # type: ignore[call-overload]


def is_id(value: object) -> bool:
    """Whether the value can be a token id."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def is_list(value: object) -> bool:
    """Whether the value is a list or a tuple."""
    return isinstance(value, (list, tuple))


def is_text(value: object) -> bool:
    """Whether the value is a non-empty string without unpaired surrogates (which UTF-8 cannot encode)."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= character <= "\udfff" for character in value)


def plain(value: Any, whole: bool = False) -> Any:
    """Convert a setting to plain Python numbers, lists and dicts, which can be compared and stored as JSON.

    Args:
        value: a number, string, array, tensor, sequence or dict; anything else is returned unchanged.
        whole: convert 3.0 to 3.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if is_list(value):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {_key(key): plain(item) for key, item in value.items()}
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def _key(key: Any) -> Any:
    key = plain(key)
    return tuple(key) if isinstance(key, list) else key  # a key cannot be a list


def _is_sequence(value: Any) -> bool:
    return is_list(value) and len(value) > 0 and all(map(is_id, value))


LARGEST = 1e30  # largest factor or summand for float32 logits, whose range ends at 3.4e38
_INFINITE = "(larger values overflow float32 logits)"

NUMBER = Rule(is_number, "a number")
POSITIVE = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE = Rule(lambda v: is_number(v) and v >= 0, "a number, 0 or more")
FRACTION = Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
POSITIVE_FRACTION = Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, at most 1")
BELOW_ONE = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
AT_LEAST_ONE = Rule(lambda v: is_number(v) and v >= 1, "a number, 1 or more")
COUNT = Rule(lambda v: is_whole(v) and v >= 1, "a whole number, 1 or more", True)
COUNT_OR_ZERO = Rule(lambda v: is_whole(v) and v >= 0, "a whole number, 0 or more", True)
COUNT_OR_NONE = Rule(lambda v: v is None or COUNT.accepts(v), "a whole number, 1 or more, or None for no limit", True)
COUNT_OR_ZERO_OR_NONE = Rule(
    lambda v: v is None or COUNT_OR_ZERO.accepts(v), "a whole number, 0 or more, or None", True
)
TWO_OR_MORE_OR_NONE = Rule(lambda v: v is None or (is_whole(v) and v >= 2), "a whole number, 2 or more, or None", True)
FRACTION_OR_NONE = Rule(lambda v: v is None or FRACTION.accepts(v), "a number from 0 to 1, or None")
POSITIVE_OR_NONE = Rule(lambda v: v is None or POSITIVE.accepts(v), "a number above 0, or None for no limit")
ONE_TO_THREE = Rule(lambda v: is_number(v) and 1 <= v <= 3, "a number from 1 to 3")
ZERO_TO_099 = Rule(lambda v: is_number(v) and 0 <= v <= 0.99, "a number from 0 to 0.99")
SCOPE = Rule(lambda v: v in ("prompt", "output", "both"), "'prompt', 'output' or 'both'")
YES_OR_NO = Rule(lambda v: isinstance(v, bool), "True or False")
ADDED = Rule(lambda v: is_number(v) and abs(v) <= LARGEST, f"a number from -1e30 to 1e30 {_INFINITE}")
FACTOR = Rule(
    lambda v: is_number(v) and 1 / LARGEST <= v <= LARGEST, f"a number above 0, from 1e-30 to 1e30 {_INFINITE}"
)
FACTOR_OR_ZERO = Rule(lambda v: is_number(v) and 0 <= v <= LARGEST, f"a number, 0 or more, up to 1e30 {_INFINITE}")
BIAS = Rule(lambda v: ADDED.accepts(v) or v == -math.inf, f"{ADDED.expected}, or minus infinity to forbid")
FUNCTION = Rule(callable, "a function")
TEMPERATURE = Rule(
    lambda v: is_number(v) and (v == 0 or v >= 1e-30),  # a smaller divisor overflows float32
    "0 (greedy) or a number above 0, such as 0.8",
)
SEED = Rule(lambda v: v is None or (is_id(v) and v < 2**64), "a whole number from 0 to 2**64 - 1; null draws one")
TEXTS = Rule(
    lambda v: is_list(v) and all(map(is_text, v)),
    "a non-empty string that UTF-8 can encode, or a list of them",
    wraps=True,
)
TEXT_OR_TEXTS = Rule(lambda v: is_text(v) or TEXTS.accepts(v), "a name, or a list of names")
ID_OR_NONE = Rule(lambda v: v is None or is_id(v), "a token id, or None")
ID_LIST = Rule(lambda v: is_list(v) and all(map(is_id, v)), "a list of token ids")
IDS_OR_NONE = Rule(lambda v: v is None or is_id(v) or ID_LIST.accepts(v), "a token id or a list of them, or None")
ID_LISTS = Rule(lambda v: is_list(v) and all(map(_is_sequence, v)), "a list of lists of token ids, none empty")
BIASES_OR_NONE = Rule(
    lambda v: (
        v is None
        or (isinstance(v, dict) and all(is_id(key) or is_text(key) for key in v) and all(map(BIAS.accepts, v.values())))
    ),
    f"a bias for each token id or text, such as {{50256: -5.0}} or {{' the': 2.0}}: {BIAS.expected}",
)
SEQUENCE_BIASES = Rule(
    lambda v: (
        is_list(v)
        and all(
            is_list(one) and len(one) == 2 and (_is_sequence(one[0]) or is_text(one[0])) and BIAS.accepts(one[1])
            for one in v
        )
    ),
    f"a list of pairs of token ids, or a text, and a bias, such as [[[7, 8], -2.0]]: {BIAS.expected}",
)
DECAY_OR_NONE = Rule(
    lambda v: v is None or (is_list(v) and len(v) == 2 and COUNT_OR_ZERO.accepts(v[0]) and POSITIVE.accepts(v[1])),
    "[a whole number of tokens, a factor above 0], or None",
)
WORDS = Rule(
    lambda v: is_list(v) and all(is_text(one) or (one and TEXTS.accepts(one)) for one in v),
    "a string, or a list of strings or of lists of alternative strings",
    wraps=True,
)
WORD_IDS = Rule(
    lambda v: is_list(v) and all(_is_sequence(one) or (one and ID_LISTS.accepts(one)) for one in v),
    "a list of lists of token ids, or of lists of alternative lists",
)


def one_of(*values: Any) -> Rule:
    """A rule that accepts these values and no others (True is not 1)."""
    return Rule(
        lambda v: any(v == value and type(v) is type(value) for value in values),
        " or ".join(repr(value) for value in values),
    )


def or_none(rule: Rule, meaning: str) -> Rule:
    """Extend a rule to accept None; `meaning` says what None stands for."""
    return Rule(lambda v: v is None or rule.accepts(v), f"{rule.expected}; {meaning}", rule.whole)


def check(processor: Any, **rules: Rule) -> None:
    """Check fields with a single value.

    Raises:
        ConfigError: naming the processor, the field, its value and what was expected.
    """
    for name, rule in rules.items():
        _accept(processor, name, getattr(processor, name), rule)


def check_numbers(processor: Any, **rules: Rule) -> None:
    """Check fields with a number, or with one number per prompt (any sequence, array or tensor, converted to a tuple).

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
    """Convert one or several token ids to a non-empty tuple.

    Raises:
        ConfigError: there is no id, or a value is not a token id.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (value,)
    if not ids or not all(map(is_id, ids)):
        raise ConfigError(
            f"sampling: {type(processor).__name__}'s {name} is {value!r}; expected a token id (0 or more), or several"
        )
    return tuple(map(int, ids))


def check_vocabulary(processor: Any, largest: int, size: int) -> None:
    """Raise ConfigError if the largest token id of a processor is outside a vocabulary of this size."""
    if largest >= size:
        raise ConfigError(
            f"sampling: {type(processor).__name__} names token {largest}; expected an id below the model's vocabulary "
            f"size of {size}"
        )


def _accept(processor: Any, name: str, value: Any, rule: Rule) -> None:
    if not rule.accepts(value):
        raise ConfigError(f"sampling: {type(processor).__name__}'s {name} is {value!r}; expected {rule.expected}")


def setting(default: Any, rule: Rule, off: float | None = None, each: bool = False, **more: str) -> Any:
    """A field of `SamplingConfig` with what it accepts.

    Args:
        default: its default value.
        rule: which values it accepts.
        off: the number at which it does nothing. Such a field may be null, and may differ from prompt to prompt.
        each: it may differ from prompt to prompt though it is never off.
        more: what else is known of the field; see `minigpt.sampling.settings.shape`.
    """
    if off is not None:
        rule = or_none(rule, "null is off")
    extra = {"rule": rule, "off": off, "each": each or off is not None, **more}
    if isinstance(default, (list, dict)):  # empty ones
        return field(default_factory=type(default), metadata=extra)
    return field(default=default, metadata=extra)
