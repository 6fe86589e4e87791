"""The fields of `SamplingConfig` that shape the distribution; the table of filters.

`filter="FILE.CLASS"` names the class in minigpt/sampling/processors/ that a field makes, as CLASS(value, keep=...). All
else follows from it: the flag, the places in the orders, the conflict with mirostat, the row in docs/sampling.md, and
the tests that every filter goes through. `needs="FIELD"` marks a field that does nothing without the other one.
"""

# ruff: noqa: RUF009 - `setting` is another way to write dataclasses.field

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from minigpt.choices import Table, under
from minigpt.errors import ConfigError
from minigpt.sampling.settings import rules
from minigpt.sampling.settings.rules import setting

Number = float | None

OWN = Table("processor", "sampling", {})
"""Processors of plug-ins. Their values are in the field `extra`; 0, false and null are off, or the fact `off`."""


@dataclass(frozen=True)
class Shape:
    """Temperature, filters, mirostat and adaptive-p."""

    temperature: float = setting(0.8, rules.TEMPERATURE, each=True)
    """Divides the logits: below 1 is more predictable, above 1 more varied; 0 is greedy."""
    dynatemp_range: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """Dynamic temperature: temperature +- this, higher where the entropy is high; 0 is off."""
    dynatemp_exponent: Number = setting(None, rules.NOT_NEGATIVE, off=1)
    """Dynamic temperature: exponent of the normalised entropy; 1 is linear."""
    smoothing_factor: Number = setting(None, rules.FACTOR_OR_ZERO, off=0)
    """Quadratic smoothing of the logits: flattens the top of the distribution and cuts the tail; 0 is off."""
    smoothing_curve: Number = setting(None, rules.ONE_TO_THREE, off=1)
    """1 .. 3: how steep the curve of smoothing_factor is; 1 changes nothing."""
    top_k: int | None = setting(None, rules.COUNT_OR_ZERO, off=0, filter="truncation.TopK")
    """Keep the k most likely tokens, and those that tie with the k-th; 0 is off."""
    exact_top_k: bool = setting(False, rules.YES_OR_NO, filter="truncation.ExactTopK", needs="top_k")
    """top_k keeps exactly k tokens; of tokens that tie with the k-th, those with the lowest ids."""
    top_p: Number = setting(None, rules.FRACTION, off=1, filter="truncation.TopP")
    """Nucleus sampling: keep the smallest set of most likely tokens with total probability of at least p; 1 is off."""
    min_p: Number = setting(None, rules.FRACTION, off=0, filter="borders.MinP")
    """Remove tokens with less than this fraction of the highest probability; 0 is off."""
    typical_p: Number = setting(None, rules.POSITIVE_FRACTION, off=1, filter="truncation.Typical")
    """Locally typical sampling: keep tokens with surprise closest to the entropy, up to this total probability; 1 is
    off.
    """
    epsilon_cutoff: Number = setting(None, rules.BELOW_ONE, off=0, filter="borders.Epsilon")
    """Remove tokens with a probability below this; 0 is off."""
    eta_cutoff: Number = setting(None, rules.BELOW_ONE, off=0, filter="borders.Eta")
    """Remove tokens with a probability below a threshold that falls as the entropy rises; 0 is off."""
    top_a: Number = setting(None, rules.FRACTION, off=0, filter="borders.TopA")
    """Remove tokens with a probability below this times the square of the highest one; 0 is off."""
    tail_free: Number = setting(None, rules.FRACTION, off=1, filter="truncation.TailFree")
    """Tail-free sampling: cut where the second differences of the sorted probabilities reach this share of their sum;
    1 is off.
    """
    top_n_sigma: Number = setting(None, rules.NOT_NEGATIVE, off=0, filter="borders.TopNSigma")
    """Remove tokens whose logit is more than this many standard deviations below the highest; 0 is off."""
    top_h: Number = setting(None, rules.POSITIVE_FRACTION, off=1, filter="truncation.TopH")
    """Keep the most likely tokens that make up this share of the entropy; 1 is off."""
    p_less: bool = setting(False, rules.YES_OR_NO, filter="borders.PLess")
    """Remove tokens less likely than the probability that two draws agree (the sum of squared probabilities)."""
    xtc_probability: Number = setting(None, rules.FRACTION, off=0, filter="xtc.XTC")
    """XTC: probability of removing all tokens of at least xtc_threshold except the least likely of them; 0 is off."""
    xtc_threshold: float = setting(0.1, rules.FRACTION, each=True, needs="xtc_probability")
    """XTC: probability from which a token counts as a top choice; above 0.5 XTC does nothing."""
    adaptive_target: Number = setting(None, rules.FRACTION_OR_NONE)
    """Adaptive-p: prefer tokens so that the chosen ones have this probability on average."""
    adaptive_decay: float = setting(0.9, rules.ZERO_TO_099, each=True)
    """Adaptive-p: decay of the running average of chosen probabilities."""
    mirostat: int = setting(0, rules.one_of(0, 1, 2))
    """Mirostat 1 or 2: keep the average surprise at mirostat_tau; cannot be combined with filters. 0: off."""
    mirostat_tau: float = setting(5.0, rules.POSITIVE, each=True)
    """Mirostat: target surprise, in bits per token."""
    mirostat_eta: float = setting(0.1, rules.NOT_NEGATIVE, each=True)
    """Mirostat: learning rate."""


FILTERS = {
    spec.name: spec.metadata["filter"]
    for spec in fields(Shape)
    if "filter" in spec.metadata and "needs" not in spec.metadata
}
"""Field -> "FILE.CLASS", for the filters that are steps of an order."""


def row(name: str) -> list[str]:
    """A filter's field, and the fields without a class of their own that need it."""
    return [name, *(s.name for s in fields(Shape) if s.metadata.get("needs") == name and "filter" not in s.metadata)]


def check_own(extra: Mapping[str, Any]) -> None:
    """Raise ConfigError for a name that is no registered processor, or a setting that it does not have."""
    for key in extra:
        name, _, setting = key.partition(".")
        OWN.check(name)
        OWN.own(name, under(name, extra), f"sampling: {name}")
        if setting and name not in extra:
            raise ConfigError(f"sampling: {key} is a setting of {name}, which is not set; add a value for {name}")


def own_steps(extra: Mapping[str, Any]) -> list[str]:
    """The registered processors that are switched on."""
    return [
        key for key, value in extra.items() if "." not in key and value not in (None, False, OWN.fact(key, "off", 0))
    ]
