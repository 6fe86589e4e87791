"""The fields of `SamplingConfig` that shape the distribution a token is drawn from; the table of filters.

`filter="FILE.CLASS"` names the class in minigpt/sampling/processors/ that a field makes, as CLASS(value, keep=...). All
else follows from it: the flag, the places in the orders, the conflict with mirostat, the row in docs/sampling.md, and
the tests that every filter goes through. `needs="FIELD"` marks a field that does nothing without the other one.
"""

# ruff: noqa: RUF009 - `setting` is another way to write dataclasses.field

from __future__ import annotations

from dataclasses import dataclass, fields

from minigpt.sampling.settings import rules
from minigpt.sampling.settings.rules import setting

Number = float | None


@dataclass(frozen=True)
class Shape:
    """Temperatures, filters, and what steers the choice."""

    temperature: float = setting(0.8, rules.TEMPERATURE, each=True)
    """Logits are divided by it: below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    dynatemp_range: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """The temperature moves this far up where the model is unsure, and down where it is sure."""
    dynatemp_exponent: Number = setting(None, rules.NOT_NEGATIVE, off=1)
    """How the temperature follows the unsureness between its ends."""
    smoothing_factor: Number = setting(None, rules.FACTOR_OR_ZERO, off=0)
    """Quadratic smoothing of the logits: flattens the top and cuts the tail."""
    smoothing_curve: Number = setting(None, rules.ONE_TO_THREE, off=1)
    """1 .. 3: how much steeper the fall of smoothing_factor becomes."""
    top_k: int | None = setting(None, rules.COUNT_OR_ZERO, off=0, filter="truncation.TopK")
    """Draw from the k likeliest tokens only, and what ties with the k-th."""
    exact_top_k: bool = setting(False, rules.YES_OR_NO, filter="truncation.ExactTopK", needs="top_k")
    """Of several tokens that tie with the k-th, keep only the first, so that k are left."""
    top_p: Number = setting(None, rules.FRACTION, off=1, filter="truncation.TopP")
    """Draw from the fewest likeliest tokens whose probabilities reach p together."""
    min_p: Number = setting(None, rules.FRACTION, off=0, filter="borders.MinP")
    """Remove tokens below this share of the likeliest one's probability."""
    typical_p: Number = setting(None, rules.POSITIVE_FRACTION, off=1, filter="truncation.Typical")
    """Draw from the tokens of the most usual surprise whose probabilities reach this together."""
    epsilon_cutoff: Number = setting(None, rules.BELOW_ONE, off=0, filter="borders.Epsilon")
    """Remove tokens below this probability."""
    eta_cutoff: Number = setting(None, rules.BELOW_ONE, off=0, filter="borders.Eta")
    """Remove tokens below a probability that is lower where the model is unsure."""
    top_a: Number = setting(None, rules.FRACTION, off=0, filter="borders.TopA")
    """Remove tokens below this times the square of the likeliest one's probability."""
    tail_free: Number = setting(None, rules.FRACTION, off=1, filter="truncation.TailFree")
    """Cut the tail where the curve of probabilities has spent this share of its bends."""
    top_n_sigma: Number = setting(None, rules.NOT_NEGATIVE, off=0, filter="borders.TopNSigma")
    """Remove tokens whose logit is this many standard deviations below the highest."""
    top_h: Number = setting(None, rules.POSITIVE_FRACTION, off=1, filter="truncation.TopH")
    """Keep the likeliest tokens that make up this share of the entropy."""
    p_less: bool = setting(False, rules.YES_OR_NO, filter="borders.PLess")
    """Remove tokens less likely than it is that two draws agree."""
    xtc_probability: Number = setting(None, rules.FRACTION, off=0, filter="xtc.XTC")
    """How often to exclude the top choices: all tokens of at least xtc_threshold but the least likely one."""
    xtc_threshold: float = setting(0.1, rules.FRACTION, each=True, needs="xtc_probability")
    """The probability from which a token is a top choice; above 0.5 nothing happens."""
    adaptive_target: Number = setting(None, rules.FRACTION_OR_NONE)
    """Prefer tokens of a middling probability, so that the chosen ones have this one on average."""
    adaptive_decay: float = setting(0.9, rules.ZERO_TO_099, each=True)
    """How slowly adaptive_target forgets."""
    mirostat: int = setting(0, rules.one_of(0, 1, 2))
    """Keep the average surprise at mirostat_tau: version 1 or 2; replaces the filters above."""
    mirostat_tau: float = setting(5.0, rules.POSITIVE, each=True)
    """The surprise that mirostat aims at, in bits a token."""
    mirostat_eta: float = setting(0.1, rules.NOT_NEGATIVE, each=True)
    """How quickly mirostat follows."""


FILTERS = {
    spec.name: spec.metadata["filter"]
    for spec in fields(Shape)
    if "filter" in spec.metadata and "needs" not in spec.metadata
}
"""Field -> "FILE.CLASS", for the filters that are steps of an order."""


def row(name: str) -> list[str]:
    """A filter's field, and the fields without a class of their own that need it."""
    return [name, *(s.name for s in fields(Shape) if s.metadata.get("needs") == name and "filter" not in s.metadata)]
