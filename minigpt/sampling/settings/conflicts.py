"""Contradictory settings, found before anything is computed. Light imports only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from minigpt.errors import ConfigError
from minigpt.sampling.settings.needs import without_effect
from minigpt.sampling.settings.orders import STEPS, resolve
from minigpt.sampling.settings.shape import FILTERS, own_steps


def check_conflicts(config: Any) -> None:
    """Raise ConfigError, naming the fields, for the first contradiction in a `SamplingConfig`."""
    for problem in _problems(config):
        raise ConfigError(f"sampling: {problem}")


def switched_on(config: Any) -> list[str]:
    """The steps of `orders.STEPS` that the config switches on."""
    on = [name for name, off in _off_values(config).items() if _is_on(getattr(config, name), off)]
    if config.bad_words_ids and "bad_words" not in on:
        on.append("bad_words")
    if config.dynatemp_range and "temperature" not in on:
        on.append("temperature")
    return [*on, *own_steps(config.extra)]


def _is_on(value: Any, off: Any) -> bool:
    if value is None or value is False:
        return False
    return len(value) > 0 if isinstance(value, (list, tuple, dict)) else off is None or value != off


def _off_values(config: Any) -> dict[str, Any]:
    own = {"temperature": 1, "mirostat": 0}
    off = {spec.name: spec.metadata["off"] for spec in fields(config)}
    return {name: own.get(name, off[name]) for name in STEPS if name in off}


def _problems(config: Any) -> Iterator[str]:
    given = config
    on = switched_on(given)

    order = resolve(given.order)
    for step in on:
        if step not in order.steps and step in STEPS:
            way_out = "set temperature to 1" if step == "temperature" else f"remove {step}"
            yield f"{step} is set, but order does not list it; add {step!r} to order, or {way_out}"

    filters = [name for name in FILTERS if name in on]
    if given.mirostat and filters:
        yield f"mirostat replaces {' and '.join(filters)}; set one or the other"
    if given.mirostat and "adaptive_target" in on:
        yield "mirostat and adaptive_target cannot be combined; set one of them"
    for name in ("mirostat", "adaptive_target"):
        after = order.steps[order.steps.index(name) + 1 :] if name in on else ()
        if late := [step for step in after if step in on and step != "renormalize_logits"]:
            yield f"{name} must be last in order, but {late[0]} comes after it; move it to the end"
    if given.dynatemp_range and given.temperature == 0:
        yield "temperature is 0 (greedy), but dynatemp_range is set; set a temperature above 0"

    if given.min_new_tokens and given.min_new_tokens > given.max_new_tokens:
        yield f"min_new_tokens is {given.min_new_tokens}; expected at most max_new_tokens ({given.max_new_tokens})"
    allowed, banned = set(given.allowed_token_ids), set(given.suppress_tokens)
    if allowed and allowed <= banned:
        yield "suppress_tokens contains every token of allowed_token_ids, so no token is left; change one of them"
    first = given.forced_bos_token_id
    if first is not None and (first in banned or first in set(given.begin_suppress_tokens)):
        yield f"forced_bos_token_id is {first}, but suppress_tokens or begin_suppress_tokens forbids it; change one"
    if first is not None and allowed and first not in allowed:
        yield f"forced_bos_token_id is {first}, but allowed_token_ids does not contain it; add it there"
    last = given.forced_eos_token_id
    if "forced_eos_token_id" in on and set([last] if isinstance(last, int) else last) <= banned:
        yield f"forced_eos_token_id is {last}, but suppress_tokens forbids it; change one of them"

    for name, need in without_effect(given, on):
        if need.refused:
            yield f"{name} is set, but {need.why}; {need.refused}"
    if given.num_beams == 1:
        if given.temperature == 0 and given.num_return_sequences > 1:
            yield (
                f"temperature is 0 (greedy), so all {given.num_return_sequences} samples of num_return_sequences would "
                "be identical; set a temperature above 0, or num_beams"
            )
        return
    if given.num_return_sequences > given.num_beams:
        yield f"num_return_sequences is {given.num_return_sequences}; expected at most num_beams ({given.num_beams})"
    if given.num_beams % given.num_beam_groups:
        yield f"num_beams is {given.num_beams}; expected a multiple of num_beam_groups ({given.num_beam_groups})"
    if given.diversity_penalty and given.num_beam_groups == 1:
        yield "diversity_penalty is set, but num_beam_groups is 1; set num_beam_groups above 1"
    if given.num_beam_groups > 1 and given.beam_method != "beam":
        yield f"num_beam_groups needs beam_method 'beam', not {given.beam_method!r}"
    words = bool(given.force_words or given.force_words_ids)
    if words and (given.beam_method != "beam" or given.num_beam_groups > 1):
        yield "force_words needs beam_method 'beam' and num_beam_groups 1"
    if given.beam_method != "beam" and given.temperature == 0:
        yield f"beam_method {given.beam_method!r} samples, but temperature is 0; set a temperature above 0"
    if given.beam_method == "stochastic" and (given.length_penalty != 1 or given.early_stopping is not False):
        yield "beam_method 'stochastic' does not use length_penalty and early_stopping; remove them"
    if abs(given.length_penalty) > 20:
        yield f"length_penalty is {given.length_penalty}; expected a number from -20 to 20"
    for name in ("mirostat", "adaptive_target"):
        if name in on:
            yield f"{name} adapts to the sampled tokens of a single text and does not work with num_beams; remove one"
    for name in ("max_time", "repetition_stop", "top_logprobs"):
        if getattr(given, name) is not None:
            yield f"{name} does not work with num_beams; remove it"
    if given.stop_sequences:
        yield "stop_sequences does not work with num_beams; use stop or eos_token_id"
