"""How to sample: the fields of `SamplingConfig`, what each accepts, and their form in generation_config.json.

Imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from minigpt.errors import ConfigError
from minigpt.sampling.rules import is_id, is_number, is_whole

# field -> (accepts the value, what to write instead)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: is_whole(v) and v >= 0, "a whole number of tokens, 0 or more"),
    "temperature": (
        lambda v: is_number(v) and (v == 0 or v >= 1e-30),  # a smaller divisor overflows float32
        "0 (always the likeliest token) or a number above it, such as 0.8",
    ),
    "top_k": (
        lambda v: v is None or (is_whole(v) and v >= 0),
        "a whole number of tokens, 1 or more; 0 or null is off",
    ),
    "top_p": (lambda v: v is None or (is_number(v) and 0 <= v <= 1), "a number from 0 to 1; 1 or null is off"),
    "num_return_sequences": (lambda v: is_whole(v) and v >= 1, "a whole number of samples, 1 or more"),
    "seed": (lambda v: v is None or (is_id(v) and v < 2**64), "a whole number from 0 to 2**64 - 1; null draws one"),
    "stop": (
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(text, str) and text for text in v),
        "a list of texts, none of them empty",
    ),
    "include_stop": (lambda v: isinstance(v, bool), "true or false"),
    "eos_token_id": (
        lambda v: v is None or is_id(v) or (isinstance(v, (list, tuple)) and all(map(is_id, v))),
        "a token id or a list of them; null takes the tokenizer's end-of-text",
    ),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
    "overflow": (lambda v: v in ("slide", "stop"), "'slide' or 'stop'"),
}


def check_field(name: str, value: Any) -> None:
    """Raise ConfigError, naming the field, the value and what was expected, unless the field accepts the value."""
    accepts, expected = _RULES[name]
    if not accepts(value):
        raise ConfigError(f"sampling: {name} is {value!r}; expected {expected}")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when to stop. Names are those of transformers' GenerationConfig where it has them."""

    max_new_tokens: int = 256
    """Most tokens to write after the prompt; 0 writes none."""
    temperature: float = 0.8
    """Logits are divided by it: below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only, and what ties with the k-th; null or 0 is off."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach p together; null or 1 is off."""
    num_return_sequences: int = 1
    """Samples written for each prompt."""
    seed: int | None = None
    """0 .. 2**64 - 1: the same prompt, seed and settings give the same text; null draws a seed and reports it."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a sample where one of them appears in what was written; the prompt does not count."""
    include_stop: bool = False
    """Keep the stop text at the end of the sample rather than cut it off."""
    eos_token_id: int | list[int] | None = None
    """Token ids that end a sample; null takes the tokenizer's end-of-text."""
    ignore_eos: bool = False
    """Write on after an end-of-text token."""
    overflow: Literal["slide", "stop"] = "slide"
    """Past the model's context length: 'slide' goes on with the latest tokens in view, 'stop' ends the sample."""

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value it does not accept."""
        for name in _RULES:
            check_field(name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """As generation_config.json holds it: transformers' names, then our own for what it has no field for."""
        record = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        record["stop_strings"] = list(record.pop("stop"))
        record["do_sample"] = self.temperature > 0
        if not record["do_sample"]:
            del record["temperature"]  # transformers has no temperature 0
        return {name: value for name, value in record.items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SamplingConfig:
        """From generation_config.json, ours or Hugging Face's; keys that mean nothing here are ignored.

        An absent field keeps our default (transformers' own defaults are others), `do_sample: false` is temperature 0.

        Raises:
            ConfigError: a field holds a value that it does not accept.
        """
        known = {spec.name for spec in fields(cls)}
        values = {name: value for name, value in record.items() if name in known and value is not None}
        if stop := record.get("stop_strings"):
            values["stop"] = [stop] if isinstance(stop, str) else stop
        if record.get("do_sample") is False:
            values["temperature"] = 0.0
        config = cls(**values)
        config.validate()
        return config
