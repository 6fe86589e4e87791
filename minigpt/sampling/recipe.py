"""Settings -> processors, in the order that the settings ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from minigpt.choices import under
from minigpt.errors import ConfigError
from minigpt.sampling.processors import adaptive, bans, endings, penalties, scaling, truncation
from minigpt.sampling.processors.dry import DRY
from minigpt.sampling.processors.processors import AllowedVocabulary, Normalised, Temperature
from minigpt.sampling.settings.config import FIELDS, SamplingConfig
from minigpt.sampling.settings.conflicts import switched_on
from minigpt.sampling.settings.orders import CUSTOM, Order, resolve
from minigpt.sampling.settings.shape import FILTERS, OWN, own_steps, row

EVERYTHING = 2**31  # a top-k that keeps every token, for prompts without top-k in a batch with others that have it


class Settings:
    """The settings of all prompts as processor parameters: one value if all prompts agree, else one per prompt."""

    def __init__(self, configs: Sequence[SamplingConfig], tokenizer: Any, keep: int) -> None:
        self.configs = configs
        self.tokenizer = tokenizer
        self.keep = keep
        """Minimum number of tokens that each filter keeps."""

    def __getattr__(self, name: str) -> Any:
        off = FIELDS[name].metadata["off"]
        values = [getattr(config, name) for config in self.configs]
        return _agreed([off if value is None else value for value in values])

    @property
    def top_k(self) -> Any:
        """Value of top_k; 0 is replaced by `EVERYTHING`."""
        return _agreed([config.top_k or EVERYTHING for config in self.configs])

    @property
    def last(self) -> Any:
        """Number of the token at which ForcedLast forces an end, at least 1; max_new_tokens 0 never reaches it."""
        return _agreed([max(1, config.max_new_tokens) for config in self.configs])

    @property
    def window(self) -> int | None:
        """Number of most recent tokens that penalties look at; None for all."""
        return self.configs[0].penalty_window


def _agreed(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else tuple(values)


def _temperature(given: Settings) -> Any:
    if not any(config.dynatemp_range for config in given.configs):
        return Temperature(given.temperature)
    temperatures = [config.temperature for config in given.configs]
    moving = scaling.DynamicTemperature(
        _agreed([t or 1.0 for t in temperatures]), given.dynatemp_range, given.dynatemp_exponent
    )
    if 0 not in temperatures:
        return moving
    # DynamicTemperature does not support temperature 0; a plain Temperature makes those rows greedy.
    return [Temperature(tuple(0.0 if t == 0 else 1.0 for t in temperatures)), moving]


def _top_k(given: Settings) -> Any:
    if given.configs[0].exact_top_k:
        return truncation.ExactTopK(given.top_k, given.keep)
    return truncation.TopK(given.top_k, keep=given.keep)


def _mirostat(given: Settings) -> Any:
    kind = adaptive.Mirostat1 if given.configs[0].mirostat == 1 else adaptive.Mirostat2
    return kind(given.mirostat_tau, given.mirostat_eta)


def _bad_words(given: Settings) -> Any:
    config = given.configs[0]
    words = [ids for word in config.bad_words for ids in spellings(given.tokenizer, word)]
    return bans.BadWords([*words, *map(tuple, config.bad_words_ids)])


def _decay(given: Settings) -> Any:
    after, factor = given.configs[0].exponential_decay_length_penalty or (0, 1.0)
    return endings.ExponentialLengthDecay(after, factor)


def _dry(given: Settings) -> Any:
    config = given.configs[0]
    return DRY(
        given.dry_multiplier,
        given.dry_base,
        given.dry_allowed_length,
        breakers(given.tokenizer, tuple(config.dry_sequence_breakers)),
        window=config.dry_window,
    )


def _filter(name: str) -> Callable[[Settings], Any]:
    """The maker of a filter's class from the fields of its row; a switch has no value to give it."""
    file, _, kind = FILTERS[name].partition(".")
    made = getattr(import_module(f"minigpt.sampling.processors.{file}"), kind)
    values = [] if FIELDS[name].default is False else row(name)
    return lambda given: made(*(getattr(given, value) for value in values), keep=given.keep)


def _own(name: str, extra: dict[str, Any], keep: int) -> Any:
    """A registered processor: KIND(value, **settings); `keep` is passed to classes that have such a parameter."""
    made = OWN.bound(name, under(name, extra), f"sampling: {name}")
    keeps = {"keep": keep} if "keep" in inspect.signature(OWN[name]).parameters else {}
    return made(extra[name], **keeps)


def _counted(kind: Any, strength: str) -> Callable[[Settings], Any]:
    return lambda given: kind(getattr(given, strength), given.configs[0].penalty_scope, given.window)


def _sequences(tokenizer: Any, pairs: Sequence[Any]) -> Any:
    """Biases of sequences of ids; a text stands for its spellings. Biases of the same sequence add up."""
    total: dict[tuple[int, ...], float] = {}
    for what, bias in pairs:
        for ids in spellings(tokenizer, what) if isinstance(what, str) else [tuple(what)]:
            total[ids] = total.get(ids, 0.0) + bias
    return bans.SequenceBias(total)


def _ids(kind: Any, name: str) -> Callable[[Settings], Any]:
    return lambda given: kind(getattr(given.configs[0], name))


MAKERS: dict[str, Callable[[Settings], Any]] = {  # step -> function that returns its processor, or a list of several
    "vocabulary": lambda given: AllowedVocabulary(given.tokenizer.vocab_size),
    "logit_bias": _ids(bans.LogitBias, "logit_bias"),
    "sequence_bias": lambda given: _sequences(given.tokenizer, given.configs[0].sequence_bias),
    "allowed_token_ids": _ids(bans.AllowedIds, "allowed_token_ids"),
    "encoder_repetition_penalty": lambda given: penalties.PromptRepetitionPenalty(given.encoder_repetition_penalty),
    "repetition_penalty": lambda given: penalties.RepetitionPenalty(
        given.repetition_penalty,
        given.configs[0].repetition_scope,
        given.window,
        given.configs[0].repetition_normalised,
    ),
    "presence_penalty": _counted(penalties.PresencePenalty, "presence_penalty"),
    "frequency_penalty": _counted(penalties.FrequencyPenalty, "frequency_penalty"),
    "dry_multiplier": _dry,
    "no_repeat_ngram_size": lambda given: bans.NoRepeatNGram(given.no_repeat_ngram_size),
    "encoder_no_repeat_ngram_size": lambda given: bans.PromptNoRepeatNGram(given.encoder_no_repeat_ngram_size),
    "bad_words": _bad_words,
    "min_length": lambda given: endings.MinLength(given.min_length),
    "min_new_tokens": lambda given: endings.MinNewTokens(given.min_new_tokens),
    "forced_bos_token_id": _ids(endings.ForcedFirst, "forced_bos_token_id"),
    "forced_eos_token_id": lambda given: endings.ForcedLast(given.last, given.configs[0].forced_eos_token_id),
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _ids(bans.Suppress, "suppress_tokens"),
    "begin_suppress_tokens": _ids(bans.BeginSuppress, "begin_suppress_tokens"),
    "smoothing_factor": lambda given: scaling.QuadraticSmoothing(given.smoothing_factor, given.smoothing_curve),
    "temperature": _temperature,
    **{name: _filter(name) for name in FILTERS},
    "top_k": _top_k,
    "adaptive_target": lambda given: adaptive.AdaptiveP(given.adaptive_target, given.adaptive_decay),
    "mirostat": _mirostat,
    "renormalize_logits": lambda given: Normalised(),
}


def cook(
    configs: Sequence[SamplingConfig], tokenizer: Any, model_size: int, custom: Sequence[Any] = (), keep: int = 1
) -> tuple[list[Any], Order]:
    """Build the processors for the settings, in order; a step that is off for every prompt is omitted.

    Args:
        configs: one for all prompts, or one per prompt; they may differ only in the fields of `config.PER_PROMPT`.
        tokenizer: encodes texts, and its vocab_size is the number of valid ids.
        model_size: V of the model; ids at or above the tokenizer's vocab_size are never generated.
        custom: the caller's own processors.
        keep: minimum number of tokens that each filter keeps; bans may still remove them.

    Returns:
        The processors and the resolved order.

    Raises:
        ConfigError: a forced token id is outside the tokenizer's vocabulary, or the order is invalid.
    """
    order = resolve(configs[0].order)
    on = {step for config in configs for step in switched_on(config)}
    if tokenizer.vocab_size < model_size:
        on.add("vocabulary")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        ids = getattr(configs[0], name)
        if ids not in (None, []) and max([ids] if isinstance(ids, int) else ids) >= tokenizer.vocab_size:
            raise ConfigError(
                f"sampling: {name} is {ids}; expected ids below the tokenizer's vocab_size {tokenizer.vocab_size}"
            )
    given = Settings(configs, tokenizer, keep)
    steps = list(order.steps)
    if custom and CUSTOM not in steps:  # an order without CUSTOM runs the caller's processors right after "vocabulary"
        steps.insert(1, CUSTOM)
    own = own_steps(configs[0].extra)
    unplaced = [name for name in own if name not in steps]
    at = steps.index(CUSTOM) + 1 if CUSTOM in steps else 1
    steps[at:at] = unplaced
    processors: list[Any] = []
    for step in steps:
        if step == CUSTOM:
            processors += custom
            if custom and "vocabulary" in on:  # forbid invalid ids again, in case a custom processor allowed them
                processors.append(MAKERS["vocabulary"](given))
        elif step in own:
            processors.append(_own(step, configs[0].extra, keep))
        elif step in on:
            made = MAKERS[step](given)
            processors += made if isinstance(made, list) else [made]
    return processors, order


def spellings(tokenizer: Any, text: str) -> list[tuple[int, ...]]:
    """The distinct encodings of a text without and with a leading space."""
    spelled = [tuple(tokenizer.encode(text))]
    if not getattr(tokenizer, "spaces_apart", False):
        spelled.append(tuple(tokenizer.encode(" " + text)))
    return list(dict.fromkeys(spelled))


@lru_cache(maxsize=8)
def breakers(tokenizer: Any, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The tokens that contain one of the texts, and the encodings of texts that take several tokens."""
    if not texts:
        return ()
    wanted = [text.encode() for text in texts]
    singles = [(token,) for token, piece in enumerate(tokenizer.token_bytes()) if any(text in piece for text in wanted)]
    several = [spelled for text in texts for spelled in spellings(tokenizer, text) if len(spelled) > 1]
    return tuple(dict.fromkeys([*singles, *several]))
