"""`SamplingConfig`: its fields (some in `shape` and `length`), and reading and writing generation_config.json.

Imports nothing heavy, so that the command line shows its help quickly.
"""

# ruff: noqa: RUF009 - `setting` wraps dataclasses.field

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from minigpt.errors import ConfigError
from minigpt.sampling.settings import rules
from minigpt.sampling.settings.conflicts import check_conflicts
from minigpt.sampling.settings.length import Length
from minigpt.sampling.settings.rules import setting
from minigpt.sampling.settings.shape import OWN, Number, Shape, check_own
from minigpt.sampling.settings.unheard import name_unheard


@dataclass(frozen=True)
class SamplingConfig(Shape, Length):
    """Settings of generation, under the names of transformers' GenerationConfig where it has them.

    A number with a neutral value may be null (off), and in a call a list with one value per prompt. docs/sampling.md
    has the formulas and sources.
    """

    # Penalties.

    repetition_penalty: Number = setting(None, rules.FACTOR, off=1)
    """Divides positive logits of tokens seen before and multiplies negative ones; above 1 discourages; 1 is off."""
    repetition_scope: Literal["prompt", "output", "both"] = setting("both", rules.SCOPE)
    """Which tokens repetition_penalty counts as seen."""
    repetition_normalised: bool = setting(False, rules.YES_OR_NO)
    """Apply repetition_penalty to log-probabilities, so that a constant added to all logits has no effect."""
    encoder_repetition_penalty: Number = setting(None, rules.FACTOR, off=1)
    """Above 1 encourages tokens of the prompt; 1 is off."""
    presence_penalty: Number = setting(None, rules.ADDED, off=0)
    """Subtracted from the logits of tokens seen before; 0 is off."""
    frequency_penalty: Number = setting(None, rules.ADDED, off=0)
    """Subtracted from a token's logit once for each time the token was seen; 0 is off."""
    penalty_scope: Literal["prompt", "output", "both"] = setting("output", rules.SCOPE)
    """Which tokens presence_penalty and frequency_penalty count as seen."""
    penalty_window: int | None = setting(None, rules.COUNT_OR_NONE)
    """Repetition, presence and frequency penalty: count only the last this many tokens of the scope; null: all."""
    dry_multiplier: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """DRY: penalty for a token that would extend a repeated sequence; times dry_base for each token of length beyond
    dry_allowed_length; 0 is off.
    """
    dry_base: float = setting(1.75, rules.AT_LEAST_ONE, each=True)
    """DRY: growth of the penalty per token of the repeated sequence."""
    dry_allowed_length: int = setting(2, rules.COUNT, each=True)
    """DRY: longest repeated sequence without a penalty, in tokens."""
    dry_sequence_breakers: list[str] = setting([], rules.TEXTS)
    """DRY: strings that end a repeated sequence, such as a line break."""
    dry_window: int | None = setting(None, rules.COUNT_OR_NONE)
    """DRY: look back only this many tokens; null: all."""
    no_repeat_ngram_size: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Never generate an n-gram of this size that already occurred, in the prompt or in the output; 0 is off."""
    encoder_no_repeat_ngram_size: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Never generate an n-gram of this size that occurs in the prompt; 0 is off."""

    # Biases and bans.

    logit_bias: dict[Any, Any] | None = setting(None, rules.BIASES_OR_NONE)
    """Added to the logits of these token ids: {50256: -5.0}; -inf forbids a token. A text, {" the": 2.0}, is treated as
    in sequence_bias.
    """
    sequence_bias: list[Any] = setting([], rules.SEQUENCE_BIASES)
    """Added to the logit of the last token of a sequence, when the tokens before it are there: [[[7, 8], -2.0], [[5],
    1.0]]. A text in place of ids, [["word", -2.0]], stands for its spellings alone and after a space.
    """
    bad_words: list[str] = setting([], rules.TEXTS)
    """Texts that are never generated, alone or after a space, as the tokenizer spells them."""
    bad_words_ids: list[list[int]] = setting([], rules.ID_LISTS)
    """Sequences of token ids that are never generated."""
    allowed_token_ids: list[int] = setting([], rules.ID_LIST)
    """Generate only these tokens; an empty list allows all."""
    suppress_tokens: list[int] = setting([], rules.ID_LIST)
    """Never generate these tokens."""
    begin_suppress_tokens: list[int] = setting([], rules.ID_LIST)
    """Never generate these tokens first."""
    forced_bos_token_id: int | None = setting(None, rules.ID_OR_NONE)
    """The first token to generate."""
    forced_eos_token_id: int | list[int] | None = setting(None, rules.IDS_OR_NONE)
    """The token, or one of the tokens, to generate last when max_new_tokens is reached."""
    exponential_decay_length_penalty: list[Any] | None = setting(None, rules.DECAY_OR_NONE)
    """[start, factor]: from `start` new tokens on, raise the end-of-text logit by a factor (above 1) that grows with
    each token.
    """

    # Order.

    order: str | list[str] = setting("transformers", rules.TEXT_OR_TEXTS)
    """Order of the processors: 'transformers', 'vllm' or 'llama_cpp', or a list of step names."""
    renormalize_logits: bool = setting(False, rules.YES_OR_NO)
    """Normalise the processed logits to log-probabilities; affects the scores of beam search."""

    extra: dict[str, Any] = setting({}, rules.Rule(lambda v: isinstance(v, dict), "a mapping of processors to values"))
    """Processors of plug-ins, by name: {"top_gap": 5}, on the command line --top_gap 5."""

    # Search.

    num_beams: int = setting(1, rules.COUNT)
    """Beam width; 1 is no beam search."""
    beam_method: Literal["beam", "sample", "stochastic"] = setting("beam", rules.one_of("beam", "sample", "stochastic"))
    """'beam' keeps the best beams, 'sample' draws beams, 'stochastic' is stochastic beam search (Gumbel top-k)."""
    length_penalty: float = setting(1.0, rules.NUMBER)
    """A beam's score is its log-probability divided by its length to this power; above 0 favours long texts."""
    early_stopping: bool | Literal["never"] = setting(False, rules.one_of(True, False, "never"))
    """When beam search stops: at num_beams finished texts (true), when better ones are unlikely (false) or impossible
    ('never').
    """
    num_beam_groups: int = setting(1, rules.COUNT)
    """Diverse beam search: number of groups of beams."""
    diversity_penalty: float = setting(0.0, rules.NOT_NEGATIVE)
    """Diverse beam search: subtracted from a token's score for every earlier group that chose it in the same step."""
    force_words: list[Any] = setting([], rules.WORDS)
    """Texts that must appear in the result of a beam search; a list instead of a text means any one of its texts."""
    force_words_ids: list[Any] = setting([], rules.WORD_IDS)
    """The same as token ids: [[5, 6], [[7], [8, 9]]] means 5 6, and either 7 or 8 9."""

    # Reported values, batch size.

    top_logprobs: int | None = setting(None, rules.COUNT_OR_ZERO_OR_NONE)
    """Report for each token its rank, its probability after processing and this many most likely tokens."""
    max_rows: int | None = setting(None, rules.COUNT_OR_NONE)
    """Maximum number of samples generated in one batch; more are sorted by length and split into batches."""
    max_batch_tokens: int | None = setting(None, rules.COUNT_OR_NONE)
    """Maximum number of tokens in the KV cache of a batch."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            rule, value = spec.metadata["rule"], getattr(self, spec.name)
            value = [value] if rule.wraps and isinstance(value, str) else rules.plain(value, rule.whole)
            if spec.name == "logit_bias" and isinstance(value, dict):
                value = {key: _bias(bias) for key, bias in value.items()}
            if spec.name == "sequence_bias":
                value = _pairs(value)
            object.__setattr__(self, spec.name, value)
        self._move_texts()

    def _move_texts(self) -> None:
        """Texts of logit_bias become texts of sequence_bias, which is what they mean."""
        biases, pairs = self.logit_bias, self.sequence_bias
        given = biases.items() if isinstance(biases, dict) else ()
        texts = [key for key, bias in given if rules.is_text(key) and rules.BIAS.accepts(bias)]
        if biases and texts and isinstance(pairs, list):
            ids = {key: bias for key, bias in biases.items() if key not in texts}
            object.__setattr__(self, "logit_bias", ids or None)
            object.__setattr__(self, "sequence_bias", [*pairs, *([key, biases[key]] for key in texts)])

    def __hash__(self) -> int:
        return hash(tuple(_hashable(getattr(self, spec.name)) for spec in fields(self)))

    def validate(self) -> None:
        """Raise ConfigError for the first field with an invalid value, or for fields that contradict each other."""
        for spec in fields(self):
            check_field(spec.name, getattr(self, spec.name))
        check_own(self.extra)
        check_conflicts(self)

    def to_dict(self) -> dict[str, Any]:
        """The dict stored in generation_config.json: transformers' field names, minigpt's own for all other fields."""
        record = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        record["do_sample"] = self.temperature > 0 if self.num_beams == 1 else self.beam_method != "beam"
        if self.temperature == 0:
            del record["temperature"]  # transformers has no temperature 0
        # Omit an empty list only where it is the default: an empty eos_token_id (no end token) is not the same as null.
        empty = {s.name for s in fields(self) if s.default_factory in (list, dict) and not record[s.name]}
        record = {name: value for name, value in record.items() if value is not None and name not in empty}
        if "logit_bias" in record:
            record["logit_bias"] = {token: _stored(bias) for token, bias in record["logit_bias"].items()}
        if "sequence_bias" in record:
            record["sequence_bias"] = [[what, _stored(bias)] for what, bias in record["sequence_bias"]]
        record |= record.pop("extra", {})
        return {"stop_strings" if name == "stop" else name: value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any], where: str = "") -> SamplingConfig:
        """Build a config from generation_config.json, minigpt's or Hugging Face's; a notice lists keys without effect.

        A missing field gets minigpt's default, which may differ from transformers'. `do_sample: false` means
        temperature 0.

        Args:
            record: the content of the file.
            where: the file, for error messages.

        Raises:
            ConfigError: a field has an invalid value.
        """
        config = cls(**cls.fields_in(record))
        try:
            config.validate()
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}; correct or remove it in that file") if where else error from None
        return config

    @classmethod
    def fields_in(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The fields that a generation_config.json sets, unchecked; a notice lists keys without effect."""
        known = {spec.name for spec in fields(cls)}
        own = {name for name in record if name.partition(".")[0] in OWN}
        name_unheard(record, known | own | {"do_sample", "stop_strings"})
        values = {name: value for name, value in record.items() if name in known and value is not None}
        if own:
            values["extra"] = {**values.get("extra", {}), **{name: record[name] for name in own}}
        if stop := record.get("stop_strings"):
            values["stop"] = [stop] if isinstance(stop, str) else stop
        if isinstance(bias := values.get("logit_bias"), dict):  # JSON keys are strings
            values["logit_bias"] = {_number(token): value for token, value in bias.items()}
        searches = values.get("num_beams", 1) != 1
        if record.get("do_sample") is False and not (searches and "temperature" in values):
            values["temperature"] = 0.0
        if record.get("do_sample") and searches and "beam_method" not in values:
            values["beam_method"] = "sample"
        return values


def _bias(value: Any) -> Any:
    """A bias of minus infinity may be written "-inf": JSON and YAML have no other word for it that people know."""
    return float("-inf") if isinstance(value, str) and value.lower() in ("-inf", "-infinity", "-.inf") else value


def _stored(value: Any) -> Any:
    return "-inf" if value == float("-inf") else value


def _pairs(value: Any) -> Any:
    """sequence_bias as pairs of ids, or a text, and a bias; transformers' form is {(7, 8): -2.0}."""
    if isinstance(value, dict) and all(isinstance(key, (tuple, str)) for key in value):
        value = [[key if isinstance(key, str) else list(key), bias] for key, bias in value.items()]
    if not isinstance(value, list):
        return value
    return [[*pair[:-1], _bias(pair[-1])] if isinstance(pair, list) and pair else pair for pair in value]


def _hashable(value: Any) -> Any:
    """Equal settings have equal hashes: lists become tuples, dicts sets of pairs."""
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return frozenset((key, _hashable(item)) for key, item in value.items()) if isinstance(value, dict) else value


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


FIELDS = {spec.name: spec for spec in fields(SamplingConfig)}
PER_PROMPT = tuple(name for name, spec in FIELDS.items() if spec.metadata["each"])
"""Fields that may be a list with one value per prompt in a call."""


def check_field(name: str, value: Any) -> None:
    """Raise ConfigError, naming the field, the value and what was expected, unless the field accepts the value."""
    rule = FIELDS[name].metadata["rule"]
    if not rule.accepts(value):
        raise ConfigError(f"sampling: {name} is {value!r}; expected {rule.expected}")
