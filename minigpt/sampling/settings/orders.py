"""The order of processors: presets named after libraries, or a list.

A step has the name of the `SamplingConfig` field that switches it on. A strategy that a library lacks is placed next to
the most similar one. Imports nothing heavy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from minigpt.errors import ConfigError
from minigpt.sampling.settings.shape import FILTERS, OWN


class Order(NamedTuple):
    """Steps in the order in which they are applied."""

    steps: tuple[str, ...]
    feed: Literal["logits", "log_probs"]
    """Input of the processors in beam search: the model's logits, or their log-softmax."""


CUSTOM = "processors"  # the place of the caller's own processors, and of plug-ins' unless the order lists them

# Always the first step.
_FIRST = ("vocabulary",)
# These produce the final distribution, so only the choice of a token comes after them.
_LAST = ("adaptive_target", "mirostat", "renormalize_logits")

_BIASES = ("logit_bias", "sequence_bias")
_BANS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words")
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


_OTHERS = "the filters that the order does not name itself, in the order of their fields"


def _order(steps: tuple[str, ...], feed: Literal["logits", "log_probs"]) -> Order:
    others = [name for name in FILTERS if name not in steps]
    at = steps.index(_OTHERS)
    return Order((*steps[:at], *others, *steps[at + 1 :]), feed)


ORDERS = {
    "transformers": _order(
        (
            *_FIRST,
            *_BIASES,
            "allowed_token_ids",
            "encoder_repetition_penalty",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "dry_multiplier",
            *_BANS,
            "min_length",
            "min_new_tokens",
            *_FORCED,
            "exponential_decay_length_penalty",
            *_SUPPRESSED,
            CUSTOM,
            "smoothing_factor",
            "temperature",
            "top_h",
            "top_k",
            "top_p",
            "min_p",
            _OTHERS,
            "xtc_probability",
            *_LAST,
        ),
        "log_probs",
    ),
    "vllm": _order(
        (
            *_FIRST,
            "allowed_token_ids",
            "bad_words",
            "min_length",
            "min_new_tokens",
            *_BIASES,
            *_SUPPRESSED,
            "encoder_repetition_penalty",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "dry_multiplier",
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            *_FORCED,
            CUSTOM,
            "smoothing_factor",
            "temperature",
            "min_p",
            "top_k",
            "top_p",
            "top_h",
            _OTHERS,
            "xtc_probability",
            *_LAST,
        ),
        "logits",
    ),
    "llama_cpp": _order(
        (
            *_FIRST,
            *_BIASES,
            "allowed_token_ids",
            *_SUPPRESSED,
            *_BANS,
            "min_length",
            "min_new_tokens",
            "exponential_decay_length_penalty",
            *_FORCED,
            CUSTOM,
            "encoder_repetition_penalty",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "dry_multiplier",
            "top_n_sigma",
            "top_k",
            "top_h",
            "typical_p",
            _OTHERS,
            "top_p",
            "min_p",
            "xtc_probability",
            "smoothing_factor",
            "temperature",
            *_LAST,
        ),
        "logits",
    ),
}
STEPS = frozenset(ORDERS["transformers"].steps)


def resolve(order: str | list[str] | tuple[str, ...]) -> Order:
    """The order for a preset name or a list of steps; "vocabulary" is always the first step.

    Raises:
        ConfigError: an unknown name or step, or a step listed twice.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise ConfigError(
                f"sampling: order is {order!r}; expected one of {', '.join(ORDERS)}, or a list of steps such as "
                "['temperature', 'top_p']"
            )
        return ORDERS[order]
    for step in order:
        if step not in STEPS and step not in OWN:
            from difflib import get_close_matches

            known = [*sorted(STEPS), *OWN]
            near = get_close_matches(step, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
            raise ConfigError(f"sampling: order lists the unknown step {step!r}; {hint}")
        if list(order).count(step) > 1:
            raise ConfigError(f"sampling: order lists {step!r} twice; list each step once")
    return Order((*_FIRST, *(step for step in order if step not in _FIRST)), "logits")
