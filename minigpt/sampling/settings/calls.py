"""The settings of one call: the sampler's own, those given for the call, and one value per prompt.

    settings_of(own, 3, None, {"temperature": [0, 1, 1], "seed": 7})
                    three configs, of temperature 0, 1 and 1, and the seeds 7, 8, 9

Prompts whose configs differ only in the fields of `config.PER_PROMPT` are generated together; `groups` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from minigpt.errors import ConfigError
from minigpt.sampling.settings import rules
from minigpt.sampling.settings.config import FIELDS, PER_PROMPT, SamplingConfig, check_field
from minigpt.sampling.settings.conflicts import switched_on
from minigpt.sampling.settings.names import ours
from minigpt.sampling.settings.needs import name_without_effect
from minigpt.sampling.settings.shape import OWN

SEEDS = 2**64
_OWN_VALUE = (*PER_PROMPT, "stop")  # what prompts that are generated together may differ in

Settings = SamplingConfig | Mapping[str, Any] | Sequence[SamplingConfig | Mapping[str, Any]] | None
"""Settings for a call: of all prompts, or a list with those of each."""


class Call(NamedTuple):
    """The settings of each prompt of a call."""

    configs: list[SamplingConfig]
    """One per prompt; their `seed` is not used."""
    seeds: list[int | None]
    """One per prompt."""
    common: SamplingConfig
    """The settings without the values of single prompts; also there if there is no prompt."""
    first: int = 0
    """Index of the first prompt, if the prompts are a part of those of the call."""

    def part(self, start: int, stop: int) -> Call:
        """The settings of the prompts from start to stop."""
        return Call(self.configs[start:stop], self.seeds[start:stop], self.common, self.first + start)


def as_config(given: Any, own: SamplingConfig | None = None) -> SamplingConfig:
    """A SamplingConfig, or one from a mapping of fields; other fields are those of `own`, or the defaults.

    Raises ConfigError for anything else, and for unknown fields.
    """
    if isinstance(given, SamplingConfig):
        return given
    if type(given).__name__ == "GenerationConfig" and hasattr(given, "to_diff_dict"):  # transformers'
        record = {**given.to_diff_dict(), "do_sample": bool(given.do_sample)}  # its default may be left out
        return SamplingConfig(**SamplingConfig.fields_in(record))
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"sampling: config is {given!r}; expected a SamplingConfig, or a dict of its fields such as "
            "{'temperature': 0.7}"
        )
    return replace(own or SamplingConfig(), **_fields(dict(given), own or SamplingConfig()))


def settings_of(own: SamplingConfig, count: int, given: Settings, overrides: Mapping[str, Any], first: int = 0) -> Call:
    """The settings of a call.

    Args:
        own: the sampler's settings.
        count: number of prompts.
        given: settings that replace the sampler's; a mapping replaces only the fields it has.
        overrides: fields that replace those of all; a field of `PER_PROMPT`, and stop, may be a list with one value per
            prompt. One seed s for several prompts is s + i for prompt i.
        first: index of the first prompt.

    Raises:
        ConfigError: an unknown field, an invalid value, or a list of another length than the number of prompts.
    """
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        bases = [as_config(one, own) for one in given]
        _check_count("config", bases, count)
    else:
        bases = [own if given is None else as_config(given, own)]
    fields = _fields(dict(overrides), bases[0] if bases else own)
    several = {name: values for name, value in fields.items() if (values := _values(name, value)) is not None}
    for name, values in several.items():
        _check_count(name, values, count)
    single = {name: value for name, value in fields.items() if name not in several}
    made: dict[int, SamplingConfig] = {}  # by the identity of what they are made from, as most are the same
    for base in bases:
        if id(base) not in made:
            made[id(base)] = replace(base, **single) if single else base
    changed = [made[id(base)] for base in bases]
    common = changed[0] if changed else own
    configs = changed if len(changed) == count and len(bases) > 1 else [common] * count
    seeds = several.pop("seed", None)
    if seeds is None:
        alone = "seed" in single or len(bases) == 1
        seeds = _spread(common.seed, count, first) if alone else [config.seed for config in configs]
    if several:
        configs = [
            replace(config, **{name: values[i] for name, values in several.items()}) for i, config in enumerate(configs)
        ]
    seen: set[int] = set()
    for config in configs or (common,):
        if id(config) not in seen:
            seen.add(id(config))
            config.validate()
            if overrides or given is not None:
                name_without_effect(config, switched_on(config), None if given is not None else set(fields))
    for seed in seeds:
        check_field("seed", seed)
    return Call(configs, seeds, common, first)


def groups(configs: Sequence[SamplingConfig]) -> list[list[int]]:
    """The indices of the prompts that can be generated together, group by group."""
    keys: dict[int, SamplingConfig] = {}
    found: dict[SamplingConfig, list[int]] = {}
    for i, config in enumerate(configs):
        if id(config) not in keys:
            keys[id(config)] = replace(config, **{name: _DEFAULTS[name] for name in _OWN_VALUE})
        found.setdefault(keys[id(config)], []).append(i)
    return list(found.values())


_DEFAULTS = {name: getattr(SamplingConfig(), name) for name in _OWN_VALUE}


def _fields(given: dict[str, Any], base: SamplingConfig) -> dict[str, Any]:
    """The fields under our names; values of registered processors become `extra`."""
    own = {name: value for name, value in given.items() if name not in FIELDS and name.partition(".")[0] in OWN}
    fields = ours({name: value for name, value in given.items() if name not in own}, FIELDS)
    if own:
        fields["extra"] = {**base.extra, **fields.get("extra", {}), **own}
    return fields


def _values(name: str, value: Any) -> list[Any] | None:
    """The values of each prompt, if there is one per prompt."""
    values = rules.plain(value)
    if not isinstance(values, list) or name not in _OWN_VALUE:
        return None
    return values if name != "stop" or any(isinstance(one, list) for one in values) else None


def _check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ConfigError(f"sampling: {name} has {len(values)} values for {count} prompts; give one per prompt")


def _spread(seed: Any, count: int, first: int) -> list[int | None]:
    """One seed for each prompt: prompts with the same seed draw the same numbers at the same positions."""
    if seed is None:
        return [None] * count
    check_field("seed", seed)
    return [(int(seed) + first + i) % SEEDS for i in range(count)]
