"""What other programs call a setting: taken where the meaning is the same, otherwise answered with our name."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, NamedTuple

from minigpt.errors import ConfigError


class Name(NamedTuple):
    """A name elsewhere, and what it is here."""

    other: str
    library: str
    ours: str
    """The field, or the argument of `Sampler`, or "" if there is nothing like it."""
    same: bool
    """Whether the values mean the same, so that the name is taken for the field."""
    differs: str = ""
    """What differs, or what to do."""


NAMES = (
    Name("do_sample", "transformers", "temperature", True, "false is `temperature: 0`"),
    Name("stop_strings", "transformers", "stop", True, "only the generated text is searched"),
    Name("max_length", "transformers", "max_new_tokens", False, "counts the prompt too"),
    Name("logits_processor", "transformers", "Sampler(..., processors=[...])", False, "its processors are accepted"),
    Name("stopping_criteria", "transformers", "Sampler(..., criteria=[...])", False, "a function of the rows' context"),
    Name("prefix_allowed_tokens_fn", "transformers", "Sampler(..., processors=[PrefixAllowed(f)])", False),
    Name("generation_config", "transformers", "config", False, "a `SamplingConfig`"),
    Name("streamer", "transformers", "Sampler.stream", False, "an iterator of events"),
    Name("output_scores", "transformers", "top_logprobs", False, "log-probabilities of the likeliest tokens"),
    Name("guidance_scale", "transformers", "", False),
    Name("penalty_alpha", "transformers", "", False),
    Name("n", "vLLM", "num_return_sequences", True),
    Name("max_tokens", "vLLM", "max_new_tokens", True),
    Name("min_tokens", "vLLM", "min_new_tokens", True),
    Name("logprobs", "vLLM", "top_logprobs", True),
    Name("include_stop_str_in_output", "vLLM", "include_stop", True),
    Name("stop_token_ids", "vLLM", "eos_token_id", False, "replaces the end tokens; list the tokenizer's too"),
    Name("prompt_logprobs", "vLLM", "Sampler.score", False, "log-probabilities of a given text"),
    Name("use_beam_search", "vLLM", "num_beams", False, "above 1"),
    Name("n_predict", "llama.cpp", "max_new_tokens", False, "-1 has no counterpart; give a number"),
    Name("predict", "llama.cpp", "max_new_tokens", False, "-1 has no counterpart; give a number"),
    Name("temp", "llama.cpp", "temperature", True),
    Name("typical", "llama.cpp", "typical_p", True),
    Name("top_nsigma", "llama.cpp", "top_n_sigma", False, "off is 0, not -1"),
    Name("mirostat_ent", "llama.cpp", "mirostat_tau", True),
    Name("mirostat_lr", "llama.cpp", "mirostat_eta", True),
    Name("dynatemp_exp", "llama.cpp", "dynatemp_exponent", True),
    Name("n_probs", "llama.cpp", "top_logprobs", True),
    Name("reverse_prompt", "llama.cpp", "stop", False, "is cut off, not kept"),
    Name("repeat_penalty", "llama.cpp", "repetition_penalty", False, "counts all tokens unless penalty_window is set"),
    Name("repeat_last_n", "llama.cpp", "penalty_window", False, "all tokens is null, not -1; off is no penalty"),
    Name("dry_penalty_last_n", "llama.cpp", "dry_window", False, "all tokens is null, not -1"),
    Name("dry_sequence_breaker", "llama.cpp", "dry_sequence_breakers", False, "a list; no default"),
    Name("samplers", "llama.cpp", "order", False, "a list of step names"),
    Name("special", "llama.cpp", "skip_special_tokens", False, "false shows special tokens"),
    Name("grammar", "llama.cpp", "", False),
)
_BY_NAME = {name.other: name for name in NAMES}
TAKEN = {name.other: name.ours for name in NAMES if name.same}
"""Names elsewhere that are taken for a field."""


def ours(given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Settings under our names. Raises ConfigError for an unknown name, and for two names of one setting."""
    translated: dict[str, Any] = {}
    for key, value in given.items():
        name = key
        if key not in known:
            row = _BY_NAME.get(key)
            if row is None or not row.same:
                raise ConfigError(f"sampling: {unknown(key, known)}")
            name = row.ours
            if key == "do_sample":
                if not isinstance(value, bool):
                    raise ConfigError(f"sampling: do_sample is {value!r}; expected True or False")
                if value:
                    continue
                value = 0.0
        if name in translated or (name != key and name in given):
            raise ConfigError(f"sampling: {key} is another name of {name}; give one of them")
        translated[name] = value
    return translated


def our_flag(name: str) -> str | None:
    """The field that a flag with another program's name means; None for an unknown name.

    Raises ConfigError for a name that means something else.
    """
    if name in TAKEN:
        return TAKEN[name]
    if name in _BY_NAME:
        raise ConfigError(f"--{unknown(name, ())}")
    return None


def unknown(key: str, known: Collection[str]) -> str:
    """The message about a name that is no setting."""
    row = _BY_NAME.get(key)
    if row is not None and row.ours:
        return f"{key} ({row.library}) is {row.ours} here" + (f": {row.differs}" if row.differs else "")
    if row is not None:
        return f"{key} ({row.library}) has no counterpart here"
    if key in ("processors", "criteria"):
        return f"{key} is an argument of Sampler(...), not of a call"
    near = get_close_matches(key, known, n=1)
    return f"unknown field '{key}'; " + (
        f"did you mean '{near[0]}'?" if near else "see SamplingConfig, or minigpt sample --help"
    )
