"""How to sample: the fields of `SamplingConfig`, some of them in `shape` and `length`, and generation_config.json.

Imports nothing heavy, so that the command line can show its help at once.
"""

# ruff: noqa: RUF009 - `setting` is another way to write dataclasses.field

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from minigpt.errors import ConfigError
from minigpt.sampling.settings import rules
from minigpt.sampling.settings.conflicts import check_conflicts
from minigpt.sampling.settings.length import Length
from minigpt.sampling.settings.rules import setting
from minigpt.sampling.settings.shape import Number, Shape
from minigpt.sampling.settings.unheard import name_unheard


@dataclass(frozen=True)
class SamplingConfig(Shape, Length):
    """How tokens are chosen and when to stop. Names are those of transformers' GenerationConfig where it has them.

    Every number that has a neutral value may be null, and in a call be a list of one value for each prompt. Which
    strategy is which, with formulas and sources: docs/sampling.md.
    """

    # Penalties.

    repetition_penalty: Number = setting(None, rules.FACTOR, off=1)
    """Divides positive and multiplies negative logits of tokens seen; above 1 discourages."""
    repetition_scope: Literal["prompt", "output", "both"] = setting("both", rules.SCOPE)
    """Which tokens repetition_penalty counts."""
    repetition_normalised: bool = setting(False, rules.YES_OR_NO)
    """Multiply log-probabilities instead, so that the zero of the logits does not matter."""
    encoder_repetition_penalty: Number = setting(None, rules.FACTOR, off=1)
    """Above 1 encourages the prompt's tokens."""
    presence_penalty: Number = setting(None, rules.ADDED, off=0)
    """Lowers the logits of tokens seen."""
    frequency_penalty: Number = setting(None, rules.ADDED, off=0)
    """Lowers the logits of tokens by how often they were seen."""
    penalty_scope: Literal["prompt", "output", "both"] = setting("output", rules.SCOPE)
    """Which tokens presence_penalty and frequency_penalty count."""
    penalty_window: int | None = setting(None, rules.COUNT_OR_NONE)
    """Count only the last this many tokens of the scope, for repetition, presence and frequency; null counts all."""
    dry_multiplier: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """DRY: lower a token that would go on with a repetition by this, times dry_base for every token too many."""
    dry_base: float = setting(1.75, rules.AT_LEAST_ONE, each=True)
    """How the penalty grows with the length of the repetition."""
    dry_allowed_length: int = setting(2, rules.COUNT, each=True)
    """Tokens that may be repeated without a penalty."""
    dry_sequence_breakers: list[str] = setting([], rules.TEXTS)
    """Texts across which nothing counts as repeated, such as a line break."""
    dry_window: int | None = setting(None, rules.COUNT_OR_NONE)
    """Look back only this many tokens."""
    no_repeat_ngram_size: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Never write the same this many tokens in a row again, the prompt's included."""
    encoder_no_repeat_ngram_size: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Never write this many tokens in a row of the prompt again."""

    # Biases and bans.

    logit_bias: dict[int, float] | None = setting(None, rules.BIASES_OR_NONE)
    """Added to the logits of these token ids: {50256: -5.0}."""
    sequence_bias: list[Any] = setting([], rules.SEQUENCE_BIASES)
    """Added to a token's logit where it would complete a sequence: [[[7, 8], -2.0], [[5], 1.0]]."""
    bad_words: list[str] = setting([], rules.TEXTS)
    """Texts that are never written, alone or after a space, spelled as the tokenizer spells them."""
    bad_words_ids: list[list[int]] = setting([], rules.ID_LISTS)
    """Sequences of token ids that are never completed."""
    allowed_token_ids: list[int] = setting([], rules.ID_LIST)
    """Write only these tokens; an empty list allows all."""
    suppress_tokens: list[int] = setting([], rules.ID_LIST)
    """Never write these tokens."""
    begin_suppress_tokens: list[int] = setting([], rules.ID_LIST)
    """Never write these tokens first."""
    forced_bos_token_id: int | None = setting(None, rules.ID_OR_NONE)
    """The token to write first."""
    forced_eos_token_id: int | list[int] | None = setting(None, rules.IDS_OR_NONE)
    """The token, or one of the tokens, to write as the last of max_new_tokens."""
    exponential_decay_length_penalty: list[Any] | None = setting(None, rules.DECAY_OR_NONE)
    """[after, factor]: raise the end's logit by factor, above 1, for every token written beyond `after`."""

    # Order.

    order: str | list[str] = setting("transformers", rules.TEXT_OR_TEXTS)
    """In which the above is applied: as in 'transformers', 'vllm' or 'llama_cpp', or a list of step names."""
    renormalize_logits: bool = setting(False, rules.YES_OR_NO)
    """Make the processed logits log-probabilities again, which beams then add up."""

    # Search.

    num_beams: int = setting(1, rules.COUNT)
    """Texts followed at once in search of the likeliest; 1 is no search."""
    beam_method: Literal["beam", "sample", "stochastic"] = setting("beam", rules.one_of("beam", "sample", "stochastic"))
    """'beam' follows the best, 'sample' draws among them, 'stochastic' draws texts without replacement."""
    length_penalty: float = setting(1.0, rules.NUMBER)
    """A text's score is its log-probability over its length to this power: above 0 favours long texts."""
    early_stopping: bool | Literal["never"] = setting(False, rules.one_of(True, False, "never"))
    """Stop at num_beams finished texts (true), when better ones are unlikely (false) or impossible ('never')."""
    num_beam_groups: int = setting(1, rules.COUNT)
    """Groups of beams that keep clear of each other's tokens by diversity_penalty."""
    diversity_penalty: float = setting(0.0, rules.NOT_NEGATIVE)
    """Taken from a token's score for every earlier group that chose it in the same step."""
    force_words: list[Any] = setting([], rules.WORDS)
    """Texts that must appear in a beam search's result; a list in place of a text holds alternatives."""
    force_words_ids: list[Any] = setting([], rules.WORD_IDS)
    """The same as token ids: [[5, 6], [[7], [8, 9]]] asks for 5 6 and for 7 or 8 9."""

    # What is told, and how much is done at once.

    top_logprobs: int | None = setting(None, rules.COUNT_OR_ZERO_OR_NONE)
    """Tell for each token its rank, its probability after processing, and this many of the likeliest tokens."""
    max_rows: int | None = setting(None, rules.COUNT_OR_NONE)
    """Most samples written at once; more are sorted by length and written batch by batch."""
    max_batch_tokens: int | None = setting(None, rules.COUNT_OR_NONE)
    """Most tokens that the cache has room for at once."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, rules.plain(getattr(self, spec.name), spec.metadata["rule"].whole))

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value it does not accept, or for fields that contradict."""
        for spec in fields(self):
            check_field(spec.name, getattr(self, spec.name))
        check_conflicts(self)

    def to_dict(self) -> dict[str, Any]:
        """As generation_config.json holds it: transformers' names, then our own for what it has no field for."""
        record = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        record["do_sample"] = self.temperature > 0 if self.num_beams == 1 else self.beam_method != "beam"
        if self.temperature == 0:
            del record["temperature"]  # transformers has no temperature 0
        # An empty list is left out where it is the default; no end token at all is something else than null.
        empty = {spec.name for spec in fields(self) if spec.default_factory is list and not record[spec.name]}
        record = {name: value for name, value in record.items() if value is not None and name not in empty}
        if "logit_bias" in record:
            record["logit_bias"] = {token: _bias(value) for token, value in record["logit_bias"].items()}
        if "sequence_bias" in record:
            record["sequence_bias"] = [[list(ids), _bias(value)] for ids, value in record["sequence_bias"]]
        return {"stop_strings" if name == "stop" else name: value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SamplingConfig:
        """From generation_config.json, ours or Hugging Face's; a notice names the keys that nothing here acts on.

        An absent field keeps our default (transformers' own defaults are others), `do_sample: false` is temperature 0.

        Raises:
            ConfigError: a field holds a value that it does not accept.
        """
        known = {spec.name for spec in fields(cls)}
        name_unheard(record, known | {"do_sample", "stop_strings"})
        values = {name: value for name, value in record.items() if name in known and value is not None}
        if stop := record.get("stop_strings"):
            values["stop"] = [stop] if isinstance(stop, str) else stop
        if isinstance(bias := values.get("logit_bias"), dict):  # JSON has no numbers for keys
            values["logit_bias"] = {_number(token): _bias(value) for token, value in bias.items()}
        if isinstance(pairs := values.get("sequence_bias"), list):
            values["sequence_bias"] = [
                [*pair[:-1], _bias(pair[-1])] if isinstance(pair, list) and pair else pair for pair in pairs
            ]
        searches = values.get("num_beams", 1) != 1
        if record.get("do_sample") is False and not (searches and "temperature" in values):
            values["temperature"] = 0.0
        if record.get("do_sample") and searches and "beam_method" not in values:
            values["beam_method"] = "sample"
        config = cls(**values)
        config.validate()
        return config


def _bias(value: Any) -> Any:
    """A ban as JSON can hold it, and back."""
    forms = {float("-inf"): "-inf", "-inf": float("-inf")}
    return forms.get(value, value) if isinstance(value, (str, float)) else value


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


FIELDS = {spec.name: spec for spec in fields(SamplingConfig)}
PER_PROMPT = tuple(name for name, spec in FIELDS.items() if spec.metadata["each"])
"""Fields that in a call may be a list of one value for each prompt."""


def check_field(name: str, value: Any) -> None:
    """Raise ConfigError, naming the field, the value and what was expected, unless the field accepts the value."""
    rule = FIELDS[name].metadata["rule"]
    if not rule.accepts(value):
        raise ConfigError(f"sampling: {name} is {value!r}; expected {rule.expected}")
