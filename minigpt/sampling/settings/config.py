"""Sampling settings: the fields of `SamplingConfig`, their accepted values, and their form in generation_config.json.

Imports nothing heavy, so that the command line shows its help quickly.
"""

# ruff: noqa: RUF009 - `setting` wraps dataclasses.field

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from minigpt.errors import ConfigError
from minigpt.sampling.settings import rules
from minigpt.sampling.settings.conflicts import check_conflicts
from minigpt.sampling.settings.rules import Rule
from minigpt.sampling.settings.unheard import name_unheard

Number = float | None


def setting(default: Any, rule: Rule, off: float | None = None, each: bool = False) -> Any:
    """A dataclass field with the rule for its accepted values.

    Args:
        default: the default value.
        rule: which values are accepted.
        off: the value at which the field has no effect. Such a field may be null and may have one value per prompt.
        each: the field may have one value per prompt although it has no `off` value.
    """
    if off is not None:
        rule = rules.or_none(rule, "null is off")
    extra = {"rule": rule, "off": off, "each": each or off is not None}
    return field(default_factory=list, metadata=extra) if default == [] else field(default=default, metadata=extra)


@dataclass(frozen=True)
class SamplingConfig:
    """How to choose tokens and when to stop. Fields have the names of transformers' GenerationConfig where it has them.

    A numeric field with an off value may also be null. In a call it may be a list with one value per prompt.
    Formulas and sources of all strategies: docs/sampling.md.
    """

    # Length and stopping.

    max_new_tokens: int = setting(256, rules.COUNT_OR_ZERO, each=True)
    """Maximum number of tokens to generate after the prompt; 0 generates none."""
    min_new_tokens: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Forbid end-of-text until this many tokens are generated; 0: off."""
    min_length: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Forbid end-of-text until prompt and output together have this many tokens; 0: off."""
    eos_token_id: int | list[int] | None = setting(None, rules.IDS_OR_NONE)
    """Token ids that end a sample; null: the tokenizer's end-of-text token."""
    ignore_eos: bool = setting(False, rules.YES_OR_NO)
    """Continue generating after an end-of-text token."""
    stop: list[str] = setting([], rules.TEXTS)
    """Strings that end a sample when they appear in the generated text; the prompt is not searched."""
    stop_sequences: list[list[int]] = setting([], rules.ID_LISTS)
    """Token id sequences that end a sample when they are generated; they are kept in the output."""
    include_stop: bool = setting(False, rules.YES_OR_NO)
    """Keep the stop string at the end of the output instead of removing it."""
    max_time: float | None = setting(None, rules.POSITIVE_OR_NONE)
    """Time limit of the call in seconds; all unfinished samples end then. null: no limit."""
    repetition_stop: int | None = setting(None, rules.TWO_OR_MORE_OR_NONE)
    """End a sample when a sequence of tokens is repeated this many times in a row; null: off."""
    repetition_stop_length: int = setting(32, rules.COUNT)
    """Longest sequence, in tokens, that repetition_stop looks for."""
    overflow: Literal["slide", "stop"] = setting("slide", rules.one_of("slide", "stop"))
    """When the model's context is full: 'slide' continues with the most recent tokens, 'stop' ends the sample."""

    # Samples.

    num_return_sequences: int = setting(1, rules.COUNT)
    """Number of samples per prompt; with beam search, number of best beams to return."""
    seed: int | None = setting(None, rules.SEED, each=True)
    """Random seed, 0 to 2**64 - 1: the same prompt, seed and settings give the same text. null: draw and report one."""

    # Temperature and filters.

    temperature: float = setting(0.8, rules.TEMPERATURE, each=True)
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it, 0 always takes the top token."""
    dynatemp_range: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """Dynamic temperature: raise the temperature by up to this at high entropy, lower it at low entropy. 0: off."""
    dynatemp_exponent: Number = setting(None, rules.NOT_NEGATIVE, off=1)
    """Dynamic temperature: exponent applied to the normalised entropy; 1: linear."""
    smoothing_factor: Number = setting(None, rules.FACTOR_OR_ZERO, off=0)
    """Strength of quadratic smoothing, which flattens the top of the distribution and cuts its tail. 0: off."""
    smoothing_curve: Number = setting(None, rules.ONE_TO_THREE, off=1)
    """Quadratic smoothing: steepness of the tail, from 1 (parabola) to 3."""
    top_k: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Sample only from the k most likely tokens; tokens that tie with the k-th logit are kept. 0: off."""
    exact_top_k: bool = setting(False, rules.YES_OR_NO)
    """Keep exactly k tokens with top_k: of tokens that tie with the k-th logit, keep the first."""
    top_p: Number = setting(None, rules.FRACTION, off=1)
    """Nucleus sampling: keep the fewest most likely tokens whose total probability reaches p. 1: off."""
    min_p: Number = setting(None, rules.FRACTION, off=0)
    """Remove tokens with less than this fraction of the top token's probability. 0: off."""
    typical_p: Number = setting(None, rules.POSITIVE_FRACTION, off=1)
    """Locally typical sampling: keep tokens with surprise closest to the entropy, up to this total mass. 1: off."""
    epsilon_cutoff: Number = setting(None, rules.BELOW_ONE, off=0)
    """Epsilon sampling: remove tokens with a probability below this. 0: off."""
    eta_cutoff: Number = setting(None, rules.BELOW_ONE, off=0)
    """Eta sampling: epsilon sampling whose threshold falls as the entropy rises. 0: off."""
    top_a: Number = setting(None, rules.FRACTION, off=0)
    """Remove tokens with a probability below this times the squared probability of the top token. 0: off."""
    tail_free: Number = setting(None, rules.FRACTION, off=1)
    """Tail-free sampling: cut the tail at this fraction of the sorted probabilities' total curvature. 1: off."""
    top_n_sigma: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """Remove tokens whose logit is more than this many standard deviations below the highest. 0: off."""
    top_h: Number = setting(None, rules.POSITIVE_FRACTION, off=1)
    """Keep the most likely tokens that account for this fraction of the entropy. 1: off."""
    p_less: bool = setting(False, rules.YES_OR_NO)
    """Remove tokens whose probability is below the sum of all squared probabilities."""
    xtc_probability: Number = setting(None, rules.FRACTION, off=0)
    """XTC: chance per token of removing all tokens at or above xtc_threshold but the least likely of them. 0: off."""
    xtc_threshold: float = setting(0.1, rules.FRACTION, each=True)
    """XTC: probability from which a token counts as a top choice; above 0.5, XTC has no effect."""
    adaptive_target: Number = setting(None, rules.FRACTION_OR_NONE)
    """Adaptive-p: favour tokens near this probability, so that generated tokens average it. null: off."""
    adaptive_decay: float = setting(0.9, rules.ZERO_TO_099, each=True)
    """Adaptive-p: decay rate of the running average; higher values average over more tokens."""
    mirostat: int = setting(0, rules.one_of(0, 1, 2))
    """Mirostat version 1 or 2: hold the average surprise at mirostat_tau; replaces the filters above. 0: off."""
    mirostat_tau: float = setting(5.0, rules.POSITIVE, each=True)
    """Mirostat: target surprise in bits per token."""
    mirostat_eta: float = setting(0.1, rules.NOT_NEGATIVE, each=True)
    """Mirostat: learning rate of the surprise limit."""

    # Penalties.

    repetition_penalty: Number = setting(None, rules.FACTOR, off=1)
    """Divide positive and multiply negative logits of seen tokens by this; above 1 discourages them. 1: off."""
    repetition_scope: Literal["prompt", "output", "both"] = setting("both", rules.SCOPE)
    """Tokens that count as seen for repetition_penalty: those of the prompt, the output or both."""
    repetition_normalised: bool = setting(False, rules.YES_OR_NO)
    """Apply repetition_penalty to log-probabilities, so that a constant shift of the logits has no effect."""
    encoder_repetition_penalty: Number = setting(None, rules.FACTOR, off=1)
    """Inverse repetition penalty on the prompt's tokens: above 1 encourages them. 1: off."""
    presence_penalty: Number = setting(None, rules.ADDED, off=0)
    """Subtracted from the logit of every seen token. 0: off."""
    frequency_penalty: Number = setting(None, rules.ADDED, off=0)
    """Subtracted from a token's logit once for each time the token was seen. 0: off."""
    penalty_scope: Literal["prompt", "output", "both"] = setting("output", rules.SCOPE)
    """Tokens that count as seen for presence_penalty and frequency_penalty."""
    penalty_window: int | None = setting(None, rules.COUNT_OR_NONE)
    """Repetition, presence and frequency penalties count only this many most recent tokens of the scope. null: all."""
    dry_multiplier: Number = setting(None, rules.NOT_NEGATIVE, off=0)
    """DRY: penalty on a token that would extend a repetition of dry_allowed_length tokens. 0: off."""
    dry_base: float = setting(1.75, rules.AT_LEAST_ONE, each=True)
    """DRY: the penalty is multiplied by this for each further token of the repetition."""
    dry_allowed_length: int = setting(2, rules.COUNT, each=True)
    """DRY: number of tokens that may repeat before the next one is penalised."""
    dry_sequence_breakers: list[str] = setting([], rules.TEXTS)
    """DRY: strings that interrupt a repetition, such as a line break."""
    dry_window: int | None = setting(None, rules.COUNT_OR_NONE)
    """DRY: search only this many most recent tokens for repetitions. null: all."""
    no_repeat_ngram_size: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Never generate an n-gram of this size that already occurs in the prompt or output. 0: off."""
    encoder_no_repeat_ngram_size: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Never generate an n-gram of this size that occurs in the prompt. 0: off."""

    # Biases and bans.

    logit_bias: dict[int, float] | None = setting(None, rules.BIASES_OR_NONE)
    """Added to the logits of these token ids: {50256: -5.0}; -inf forbids a token."""
    sequence_bias: list[Any] = setting([], rules.SEQUENCE_BIASES)
    """Added to the logit of a token that would complete a sequence of ids: [[[7, 8], -2.0], [[5], 1.0]]."""
    bad_words: list[str] = setting([], rules.TEXTS)
    """Texts never to generate, with or without a leading space; bans only the tokenizer's own encoding of them."""
    bad_words_ids: list[list[int]] = setting([], rules.ID_LISTS)
    """Sequences of token ids never to generate."""
    allowed_token_ids: list[int] = setting([], rules.ID_LIST)
    """Generate only these token ids; an empty list allows all."""
    suppress_tokens: list[int] = setting([], rules.ID_LIST)
    """Token ids never to generate."""
    begin_suppress_tokens: list[int] = setting([], rules.ID_LIST)
    """Token ids never to generate as the first token."""
    forced_bos_token_id: int | None = setting(None, rules.ID_OR_NONE)
    """Token id to generate first."""
    forced_eos_token_id: int | list[int] | None = setting(None, rules.IDS_OR_NONE)
    """Token id, or list of alternatives, to generate as the last token when max_new_tokens is reached."""
    exponential_decay_length_penalty: list[Any] | None = setting(None, rules.DECAY_OR_NONE)
    """[start, factor]: n tokens past start, add |logit| * (factor^n - 1) to the end-of-text logit. null: off."""

    # Order.

    order: str | list[str] = setting("transformers", rules.TEXT_OR_TEXTS)
    """Order of the processors: 'transformers', 'vllm' or 'llama_cpp', or a list of step names."""
    renormalize_logits: bool = setting(False, rules.YES_OR_NO)
    """Apply log-softmax after all processors; beam search then sums normalised log-probabilities."""

    # Search.

    num_beams: int = setting(1, rules.COUNT)
    """Beam search: number of beams per prompt; 1: no beam search."""
    beam_method: Literal["beam", "sample", "stochastic"] = setting("beam", rules.one_of("beam", "sample", "stochastic"))
    """'beam' keeps the most likely beams, 'sample' samples them, 'stochastic' samples texts without replacement."""
    length_penalty: float = setting(1.0, rules.NUMBER)
    """A beam's score is its log-probability / length ** length_penalty: above 0 favours longer texts."""
    early_stopping: bool | Literal["never"] = setting(False, rules.one_of(True, False, "never"))
    """Stop at num_beams finished texts: at once (true), if better ones are unlikely (false) or impossible ('never')."""
    num_beam_groups: int = setting(1, rules.COUNT)
    """Diverse beam search: number of groups that avoid each other's tokens by diversity_penalty."""
    diversity_penalty: float = setting(0.0, rules.NOT_NEGATIVE)
    """Subtracted from a token's score for each beam of an earlier group that chose it at the same step."""
    force_words: list[Any] = setting([], rules.WORDS)
    """Texts that must appear in the result of beam search; an inner list holds alternatives."""
    force_words_ids: list[Any] = setting([], rules.WORD_IDS)
    """Like force_words, as token ids: [[5, 6], [[7], [8, 9]]] requires 5 6, and either 7 or 8 9."""

    # Reporting and batching.

    top_logprobs: int | None = setting(None, rules.COUNT_OR_ZERO_OR_NONE)
    """Report each token's rank, its probability after processing and this many of the most likely tokens. null: off."""
    max_rows: int | None = setting(None, rules.COUNT_OR_NONE)
    """Maximum number of samples per batch; more are sorted by length and split into batches. null: no limit."""
    max_batch_tokens: int | None = setting(None, rules.COUNT_OR_NONE)
    """Maximum size of a batch's KV cache, in tokens over all samples. null: no limit."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, rules.plain(getattr(self, spec.name), spec.metadata["rule"].whole))

    def validate(self) -> None:
        """Raise ConfigError for the first field with an invalid value, or for fields that contradict each other."""
        for spec in fields(self):
            check_field(spec.name, getattr(self, spec.name))
        check_conflicts(self)

    def to_dict(self) -> dict[str, Any]:
        """The dict stored in generation_config.json: transformers' field names, minigpt's own for all other fields."""
        record = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        record["do_sample"] = self.temperature > 0 if self.num_beams == 1 else self.beam_method != "beam"
        if self.temperature == 0:
            del record["temperature"]  # transformers has no temperature 0
        # Omit an empty list only where it is the default: an empty eos_token_id (no end token) is not the same as null.
        empty = {spec.name for spec in fields(self) if spec.default_factory is list and not record[spec.name]}
        record = {name: value for name, value in record.items() if value is not None and name not in empty}
        if "logit_bias" in record:
            record["logit_bias"] = {token: _bias(value) for token, value in record["logit_bias"].items()}
        if "sequence_bias" in record:
            record["sequence_bias"] = [[list(ids), _bias(value)] for ids, value in record["sequence_bias"]]
        return {"stop_strings" if name == "stop" else name: value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SamplingConfig:
        """Build a config from generation_config.json, minigpt's or Hugging Face's; a notice lists keys without effect.

        A missing field gets minigpt's default, which may differ from transformers'. `do_sample: false` means
        temperature 0.

        Raises:
            ConfigError: a field has an invalid value.
        """
        known = {spec.name for spec in fields(cls)}
        name_unheard(record, known | {"do_sample", "stop_strings"})
        values = {name: value for name, value in record.items() if name in known and value is not None}
        if stop := record.get("stop_strings"):
            values["stop"] = [stop] if isinstance(stop, str) else stop
        if isinstance(bias := values.get("logit_bias"), dict):  # JSON keys are strings
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
    """Convert an infinite bias to and from a string, since JSON has no infinity."""
    forms = {float("-inf"): "-inf", "-inf": float("-inf")}
    return forms.get(value, value) if isinstance(value, (str, float)) else value


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
