"""Settings that have no effect without another one: refused where that would lose what was asked, else named once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from minigpt.sampling.settings.shape import FILTERS
from minigpt.terminal import notice_once


class Need(NamedTuple):
    """Fields, and what they need to have an effect."""

    fields: tuple[str, ...]
    met: Callable[[Any, list[str]], bool]
    """(config, steps that are on) -> whether the fields have an effect."""
    why: str
    """Why they have none."""
    refused: str = ""
    """What to do, if the fields without an effect are an error."""


def _on(*steps: str) -> Callable[[Any, list[str]], bool]:
    return lambda config, on: any(step in on for step in steps)


def _draws(config: Any, on: list[str]) -> bool:
    """Whether tokens are drawn: neither greedy decoding nor plain beam search."""
    return config.temperature > 0 if config.num_beams == 1 else config.beam_method != "beam"


def _searches(config: Any, on: list[str]) -> bool:
    return config.num_beams > 1


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_SEARCH = ("num_beam_groups", "diversity_penalty", "beam_method", "force_words", "force_words_ids")
NEEDS = (
    Need(_SEARCH, _searches, "num_beams is 1", "set num_beams above 1"),
    Need(("length_penalty", "early_stopping"), _searches, "num_beams is 1"),
    Need(("exact_top_k",), _on("top_k"), "top_k is off"),
    Need(("smoothing_curve",), _on("smoothing_factor"), "smoothing_factor is off"),
    Need(("dynatemp_exponent",), lambda config, on: bool(config.dynatemp_range), "dynatemp_range is off"),
    Need(("xtc_threshold",), _on("xtc_probability"), "xtc_probability is off"),
    Need(("adaptive_decay",), _on("adaptive_target"), "adaptive_target is not set"),
    Need(("mirostat_tau", "mirostat_eta"), _on("mirostat"), "mirostat is off"),
    Need(("repetition_scope", "repetition_normalised"), _on("repetition_penalty"), "repetition_penalty is off"),
    Need(("penalty_scope",), _on(*_PENALTIES[1:]), "presence_penalty and frequency_penalty are off"),
    Need(("penalty_window",), _on(*_PENALTIES), f"{', '.join(_PENALTIES)} are off"),
    Need(
        ("dry_base", "dry_allowed_length", "dry_sequence_breakers", "dry_window"),
        _on("dry_multiplier"),
        "dry_multiplier is off",
    ),
    Need(("include_stop",), lambda config, on: bool(config.stop), "stop is empty"),
    Need(("repetition_stop_length",), lambda config, on: config.repetition_stop is not None, "repetition_stop is off"),
    Need(
        ("eos_token_id", "min_new_tokens", "min_length", "exponential_decay_length_penalty"),
        lambda config, on: not config.ignore_eos,
        "ignore_eos is on",
    ),
    Need(
        ("dynatemp_range", "smoothing_factor", *FILTERS, "mirostat", "adaptive_target", "seed"),
        _draws,
        "no token is drawn (temperature 0, or plain beam search)",
    ),
)


def without_effect(config: Any, on: list[str]) -> Iterator[tuple[str, Need]]:
    """The fields of a `SamplingConfig` that are set and have no effect, each with the need that is not met."""
    for need in NEEDS:
        if not need.met(config, on):
            for name in need.fields:
                if _is_set(config, name):
                    yield name, need


def _is_set(config: Any, name: str) -> bool:
    spec = type(config).__dataclass_fields__[name]
    value, off = getattr(config, name), spec.metadata["off"]
    default = spec.default_factory() if callable(spec.default_factory) else spec.default
    return value is not None and value != default and (off is None or value != off)


def name_without_effect(config: Any, on: list[str], among: Collection[str] | None = None) -> None:
    """Show one notice, once, about the fields that are set and have no effect; `among`: only about these."""
    told: dict[str, list[str]] = {}
    for name, need in without_effect(config, on):
        if among is None or name in among:
            told.setdefault(need.why, []).append(name)
    for why, names in told.items():
        notice_once(f"sampling: {' and '.join(names)} {'has' if len(names) == 1 else 'have'} no effect: {why}")
