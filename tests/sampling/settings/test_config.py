"""What the settings accept, which of them contradict each other, and how they are stored."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import FIELDS, SamplingConfig
from minigpt.sampling.settings.orders import ORDERS, STEPS, resolve
from minigpt.sampling.settings.shape import FILTERS
from processor_cases import filter_setting, filter_values
from table_model import LetterTokenizer, TableLM

INF, NAN = math.inf, math.nan

COUNTS = [0, 3, 3.0, np.int64(3)], [-1, 2.5, True, "3", INF, NAN, [3, "4"]]
COUNTS_OR_OFF = [None, *COUNTS[0]], COUNTS[1]
FROM_ONE = [1, 3.0, np.int32(3)], [0, -1, 1.5, None, "1", True]
FROM_ONE_OR_NONE = [None, *FROM_ONE[0]], [0, -1, 1.5, "1", True]
FRACTIONS_OR_OFF = [None, 0, 1, 0.5, np.float32(0.5)], [-0.1, 1.1, "0.5", True, NAN]
PROPER_FRACTIONS_OR_OFF = [None, 1, 1e-3], [0, 1.1, -0.5, "1"]
BELOW_ONE_OR_OFF = [None, 0, 0.999], [1, 1.0, -1e-9, "0"]
NOT_NEGATIVE_OR_OFF = [None, 0, 0.5, 100], [-0.1, INF, NAN, "1", True]
POSITIVE_OR_OFF = [None, 1, 0.1, 5], [0, -1, INF, NAN, "1"]
NUMBERS_OR_OFF = [None, 0, -2.5, 3], [INF, NAN, "1", True]
POSITIVES = [5, 0.1, np.float64(2)], [0, -1, None, NAN, INF, "5"]
NOT_NEGATIVES = [0, 0.1, 3], [-0.1, None, NAN, "1", True]
SWITCH = [True, False], [None, 0, 1, "yes"]
SCOPES = ["prompt", "output", "both"], ["all", None, 0]
TEXTS = [[], ["a"], ("a", "b c"), ["\n", "é"], "a"], [[""], [1], None, [["a"]], 3]
IDS = [[], [5], (5, 0), np.array([5, 6])], [5, [-1], ["a"], None, [1.0], [True]]
ID_LISTS = [[], [[5]], [[5, 6], [7]], ((5,),)], [[5], [[]], [[-1]], "a", None, [["a"]]]
ID_OR_NONE = [None, 0, 7, np.int64(7)], [-1, 1.0, "7", True]
IDS_OR_NONE = [None, 0, 7, [], [7], [7, 8], np.array([7, 8])], [-1, 1.0, "7", True, [7, -1], [[7]]]

ACCEPTS: dict[str, tuple[list, list]] = {
    "max_new_tokens": ([1, 3.0, 0, np.int64(7)], [-1, 1.5, None, True, "9"]),
    "min_new_tokens": COUNTS_OR_OFF,
    "min_length": COUNTS_OR_OFF,
    "eos_token_id": IDS_OR_NONE,
    "ignore_eos": SWITCH,
    "stop": TEXTS,
    "stop_sequences": ID_LISTS,
    "include_stop": SWITCH,
    "max_time": ([None, 0.5, 10], [0, -1, NAN, "1"]),
    "repetition_stop": ([None, 2, 3.0], [0, 1, 2.5, "2"]),
    "repetition_stop_length": FROM_ONE,
    "overflow": (["slide", "stop"], ["wrap", None, 0]),
    "add_special_tokens": SWITCH,
    "parse_special": SWITCH,
    "skip_special_tokens": SWITCH,
    "num_return_sequences": FROM_ONE,
    "seed": ([None, 0, 2**64 - 1, np.uint64(5)], [-1, 2**64, 1.0, True, "7"]),
    "temperature": ([0, 0.0, 1, 1e-30, 50.0, np.float32(0.5)], [-1, 1e-31, INF, NAN, None, "hot", True]),
    "dynatemp_range": NOT_NEGATIVE_OR_OFF,
    "dynatemp_exponent": NOT_NEGATIVE_OR_OFF,
    "smoothing_factor": NOT_NEGATIVE_OR_OFF,
    "smoothing_curve": ([None, 1, 2.5, 3], [0.9, 3.1, "1"]),
    "top_k": COUNTS_OR_OFF,
    "exact_top_k": SWITCH,
    "top_p": FRACTIONS_OR_OFF,
    "min_p": FRACTIONS_OR_OFF,
    "typical_p": PROPER_FRACTIONS_OR_OFF,
    "epsilon_cutoff": BELOW_ONE_OR_OFF,
    "eta_cutoff": BELOW_ONE_OR_OFF,
    "top_a": FRACTIONS_OR_OFF,
    "tail_free": FRACTIONS_OR_OFF,
    "top_n_sigma": NOT_NEGATIVE_OR_OFF,
    "top_h": PROPER_FRACTIONS_OR_OFF,
    "p_less": SWITCH,
    "xtc_probability": FRACTIONS_OR_OFF,
    "xtc_threshold": ([0, 0.1, 1], [-0.1, 1.1, None, "0"]),
    "adaptive_target": FRACTIONS_OR_OFF,
    "adaptive_decay": ([0, 0.5, 0.99], [1, -0.1, None, 0.991]),
    "mirostat": ([0, 1, 2, np.int64(2)], [3, True, "2", None]),
    "mirostat_tau": POSITIVES,
    "mirostat_eta": NOT_NEGATIVES,
    "repetition_penalty": POSITIVE_OR_OFF,
    "repetition_scope": SCOPES,
    "repetition_normalised": SWITCH,
    "encoder_repetition_penalty": POSITIVE_OR_OFF,
    "presence_penalty": NUMBERS_OR_OFF,
    "frequency_penalty": NUMBERS_OR_OFF,
    "penalty_scope": SCOPES,
    "penalty_window": FROM_ONE_OR_NONE,
    "dry_multiplier": NOT_NEGATIVE_OR_OFF,
    "dry_base": ([1, 1.75], [0.9, None, "2"]),
    "dry_allowed_length": FROM_ONE,
    "dry_sequence_breakers": TEXTS,
    "dry_window": FROM_ONE_OR_NONE,
    "no_repeat_ngram_size": COUNTS_OR_OFF,
    "encoder_no_repeat_ngram_size": COUNTS_OR_OFF,
    "logit_bias": (
        [None, {}, {5: -2.0, 0: 1}, {np.int64(5): -INF}, {"a": 1, 5: 2}, {"5": 1}, {5: "-inf"}],
        [{-1: 1.0}, {5: INF}, {5: NAN}, {(5,): 1}, {5: "x"}, [5], 5],
    ),
    "sequence_bias": (
        [[], [[[7, 8], -2.0], [[5], 1]], (((7,), -INF),), {(7, 8): -2.0}, [["a", 1]], {"a": "-inf"}],
        [[[7, 8]], [[[], 1.0]], [[[7], "1"]], [[[7], INF]], {7: 1.0}, [[7, 1.0]], None],
    ),
    "bad_words": TEXTS,
    "bad_words_ids": ID_LISTS,
    "allowed_token_ids": IDS,
    "suppress_tokens": IDS,
    "begin_suppress_tokens": IDS,
    "forced_bos_token_id": ID_OR_NONE,
    "forced_eos_token_id": IDS_OR_NONE,
    "exponential_decay_length_penalty": ([None, [0, 1.5], (3, 0.5)], [[3], [-1, 2.0], [3, 0], [1.5, 2], "3", [3, "a"]]),
    "order": (["vllm", "llama_cpp", ["temperature"], ("top_p", "temperature")], ["", None, 3, [1], [""]]),
    "renormalize_logits": SWITCH,
    "num_beams": FROM_ONE,
    "beam_method": (["beam", "sample", "stochastic"], ["greedy", None, 1]),
    "length_penalty": ([0, -1.5, 2], [INF, NAN, None, "1"]),
    "early_stopping": ([True, False, "never"], [1, 0, None, "always"]),
    "num_beam_groups": ([1, 2, 4.0], FROM_ONE[1]),
    "diversity_penalty": NOT_NEGATIVES,
    "force_words": ([[], "a", ["a"], ["a", ["b", "c"]]], [3, [""], [[]], [["a", ""]], [1], None]),
    "force_words_ids": ([[], [[5, 6]], [[5, 6], [[7], [8, 9]]]], [[5], [[]], [[[]]], [[-1]], "a", None]),
    "top_logprobs": ([None, 0, 5, 5.0], [-1, 1.5, "5", True]),
    "max_rows": FROM_ONE_OR_NONE,
    "max_batch_tokens": FROM_ONE_OR_NONE,
}
ACCEPTS |= {name: (filter_values(name), ["x", [1], NAN]) for name in FILTERS if name not in ACCEPTS}
BESIDE = {  # what a field needs to be without contradiction
    **{name: {"num_beams": 4} for name in ("num_beam_groups", "beam_method", "force_words", "force_words_ids")},
    "diversity_penalty": {"num_beams": 4, "num_beam_groups": 2},
}
CASES = [(name, value) for name, (accepted, _) in ACCEPTS.items() for value in accepted]


def test_the_tables_cover_every_field():
    assert ACCEPTS.keys() == FIELDS.keys() - {"extra"}  # processors of plug-ins; tests/plugins


@pytest.mark.parametrize(("name", "value"), CASES)
def test_what_a_field_accepts_is_stored_and_read_back(name, value):
    config = SamplingConfig(**{**BESIDE.get(name, {}), name: value})
    config.validate()
    assert SamplingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (_, refused) in ACCEPTS.items() for v in refused])
def test_what_a_field_refuses_is_named_with_what_it_expects(name, value):
    with pytest.raises(ConfigError) as refused:
        SamplingConfig(**{name: value}).validate()
    message = str(refused.value)
    assert message.startswith(f"sampling: {name} is {value!r}; expected ")
    assert "\n" not in message


def test_numbers_of_any_kind_become_plain_ones():
    given = {
        "top_k": 50.0,
        "temperature": 1,
        "top_p": np.float64(0.5),
        "max_new_tokens": np.int64(5),
        "num_beams": 2.0,
        "eos_token_id": np.array([3, 4]),
        "forced_eos_token_id": np.int64(3),
        "min_p": torch.tensor(0.25),
        "logit_bias": {np.int64(3): np.float32(0.5)},
        "stop": ("a",),
        "sequence_bias": (((1, 2), 0.5),),
    }
    config = SamplingConfig(**given)
    config.validate()
    plain = SamplingConfig(
        top_k=50, temperature=1.0, top_p=0.5, max_new_tokens=5, num_beams=2, eos_token_id=[3, 4], forced_eos_token_id=3,
        min_p=0.25, logit_bias={3: 0.5}, stop=["a"], sequence_bias=[[[1, 2], 0.5]],
    )  # fmt: skip
    assert config == plain
    assert type(config.top_k) is type(config.num_beams) is type(config.max_new_tokens) is int
    assert type(config.seed) is type(None)


def sampler(**settings) -> Sampler:
    model = TableLM(vocab_size=14, order=None, end_bias=0.5)
    return Sampler(model, LetterTokenizer(14), SamplingConfig(**{"max_new_tokens": 10, "seed": 2, **settings}))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"top_k": 5.0}, {"top_k": 5}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"top_logprobs": 3.0}, {"top_logprobs": 3}),
        ({"num_return_sequences": 2.0}, {"num_return_sequences": 2}),
        ({"num_beams": 3.0, "num_return_sequences": 2.0}, {"num_beams": 3, "num_return_sequences": 2}),
        ({"repetition_stop": 2.0, "repetition_stop_length": 2.0}, {"repetition_stop": 2, "repetition_stop_length": 2}),
        ({"no_repeat_ngram_size": np.int64(2)}, {"no_repeat_ngram_size": 2}),
        ({"mirostat": np.int64(2)}, {"mirostat": 2}),
        ({"forced_eos_token_id": np.int64(4)}, {"forced_eos_token_id": 4}),
        ({"eos_token_id": torch.tensor([3, 4])}, {"eos_token_id": [3, 4]}),
        ({"max_rows": 1.0}, {"max_rows": 1}),
        ({"top_k": np.array([2.0, 3.0])}, {"top_k": [2, 3]}),
    ],
)
def test_numbers_of_any_kind_give_the_text_of_plain_ones(given, plain):
    assert sampler().generate(["abab", "c"], **given) == sampler().generate(["abab", "c"], **plain)


# Contradictions: what is set, by which together the message comes, and it does not if one of these is left out.

ALONE = {"max_time": 1.0, "repetition_stop": 2, "top_logprobs": 0}
CONFLICTS: list[tuple[dict, dict, str]] = [
    ({"temperature": 1}, {"order": ["temperature"], "min_p": 0.1}, "min_p is set, but order does not list it"),
    ({}, {"order": ["top_p"]}, "add 'temperature' to order, or set temperature to 1"),
    ({}, {"order": ["temperature"], "bad_words_ids": [[5]]}, "bad_words is set, but order does not list it"),
    ({"temperature": 1}, {"order": ["top_p"], "dynatemp_range": 0.5}, "temperature is set, but order does not list it"),
    ({}, {"mirostat": 2, "top_k": 5}, "mirostat replaces top_k"),
    ({"top_p": 0.5}, {"mirostat": 1}, "mirostat replaces top_p; set one"),
    ({}, {"mirostat": 2, "adaptive_target": 0.2}, "mirostat and adaptive_target cannot be combined"),
    ({"order": ["mirostat", "temperature"]}, {"mirostat": 2}, "mirostat must be last in order, but temperature"),
    ({"order": ["adaptive_target", "temperature"]}, {"adaptive_target": 0.5}, "adaptive_target must be last"),
    ({}, {"temperature": 0, "dynatemp_range": 0.5}, "temperature is 0 .* but dynatemp_range is set"),
    ({}, {"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens is 9; expected at most max_new_tokens \(8\)"),
    ({}, {"allowed_token_ids": [3, 4], "suppress_tokens": [4, 3, 2]}, "suppress_tokens contains every token of"),
    ({}, {"forced_bos_token_id": 3, "suppress_tokens": [3]}, "forced_bos_token_id is 3, but suppress"),
    ({}, {"forced_bos_token_id": 4, "begin_suppress_tokens": [4]}, "forced_bos_token_id is 4, but suppress"),
    ({}, {"forced_bos_token_id": 3, "allowed_token_ids": [5]}, "forced_bos_token_id is 3, but allowed"),
    ({}, {"forced_eos_token_id": 0, "suppress_tokens": [0]}, "forced_eos_token_id is 0, but suppress_tokens forbids"),
    ({}, {"forced_eos_token_id": [3, 4], "suppress_tokens": [3, 4]}, r"forced_eos_token_id is \[3, 4\], but"),
    ({}, {"temperature": 0, "num_return_sequences": 3}, r"temperature is 0 \(greedy\), so all 3 samples"),
    ({}, {"beam_method": "sample"}, "beam_method is set, but num_beams is 1"),
    ({}, {"num_beam_groups": 2}, "num_beam_groups is set, but num_beams is 1"),
    ({}, {"diversity_penalty": 0.5}, "diversity_penalty is set, but num_beams is 1"),
    ({}, {"force_words": ["a"]}, "force_words is set, but num_beams is 1"),
    ({}, {"force_words_ids": [[1]]}, "force_words_ids is set, but num_beams is 1"),
    ({"num_beams": 3}, {"num_return_sequences": 4}, r"num_return_sequences is 4; expected at most num_beams \(3\)"),
    ({"num_beams": 5}, {"num_beam_groups": 2}, r"num_beams is 5; expected a multiple of num_beam_groups \(2\)"),
    ({"num_beams": 4}, {"diversity_penalty": 0.5}, "diversity_penalty is set, but num_beam_groups is 1"),
    ({"num_beams": 4}, {"num_beam_groups": 2, "beam_method": "sample"}, "num_beam_groups needs beam_method"),
    ({"num_beams": 4}, {"force_words": ["a"], "beam_method": "sample"}, "force_words needs beam_method"),
    ({"num_beams": 4}, {"force_words_ids": [[1]], "num_beam_groups": 2}, "force_words needs beam_method"),
    ({"num_beams": 4}, {"beam_method": "stochastic", "length_penalty": 0.5}, "'stochastic' does not use length"),
    ({"num_beams": 4}, {"beam_method": "stochastic", "early_stopping": True}, "'stochastic' does not use length"),
    ({"num_beams": 4}, {"length_penalty": -20.5}, "length_penalty is -20.5; expected a number from -20 to 20"),
    ({"num_beams": 4}, {"beam_method": "sample", "temperature": 0}, "'sample' samples, but temperature is 0"),
    ({"mirostat": 2}, {"num_beams": 2}, "mirostat adapts .* of a single text and does not work with num_beams"),
    ({"adaptive_target": 0.1}, {"num_beams": 2}, "adaptive_target adapts to the sampled tokens"),
    *(
        ({name: value}, {"num_beams": 2}, f"{name} does not work with num_beams; remove it")
        for name, value in ALONE.items()
    ),
    ({"stop_sequences": [[1]]}, {"num_beams": 2}, "stop_sequences does not work with num_beams"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "together", "message"), CONFLICTS)
def test_a_contradiction_is_named_and_is_none_without_either_side(base, together, message):
    with pytest.raises(ConfigError, match=f"^sampling: .*{message}") as refused:
        SamplingConfig(**base, **together).validate()
    assert "\n" not in str(refused.value)
    for left_out in together:
        SamplingConfig(**base, **{name: value for name, value in together.items() if name != left_out}).validate()


def test_no_contradiction_where_nothing_is_on():
    neutral = {name: spec.metadata["off"] for name, spec in FIELDS.items() if spec.metadata["off"] is not None}
    SamplingConfig(**neutral, temperature=1, order=[]).validate()
    assert sampler(**neutral, temperature=1).processors_for()[0] == []
    SamplingConfig(**neutral, mirostat=2).validate()
    SamplingConfig(forced_eos_token_id=[], logit_bias={}).validate()
    SamplingConfig(allowed_token_ids=[3, 4], suppress_tokens=[3]).validate()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("hf", "order is 'hf'; expected one of transformers, vllm, llama_cpp, or a list of steps"),
        (["temperatur"], "order lists the unknown step 'temperatur'; did you mean 'temperature'"),
        (["xyzzy"], "order lists the unknown step 'xyzzy'; expected some of adaptive_target, allowed"),
        (["top_k", "temperature", "top_k"], "order lists 'top_k' twice"),
    ],
)
def test_an_order_that_is_none_is_refused(order, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(order=order).validate()


def test_the_vocabularys_limit_is_first_in_every_order():
    assert all(order.steps[0] == "vocabulary" for order in ORDERS.values())
    assert resolve(["top_k", "vocabulary", "temperature"]).steps == ("vocabulary", "top_k", "temperature")
    assert all(order.steps[-3:] == ("adaptive_target", "mirostat", "renormalize_logits") for order in ORDERS.values())


EVERY_FILTER = {
    "smoothing_factor": 0.3, "top_k": 4, "top_p": 0.6, "min_p": 0.2, "typical_p": 0.3, "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.3, "top_a": 0.5, "tail_free": 0.3, "top_n_sigma": 0.5, "top_h": 0.3, "p_less": True,
    "xtc_probability": 1.0, "xtc_threshold": 0.05,
}  # fmt: skip


EVERY_FILTER |= {name: value for f in FILTERS if f not in EVERY_FILTER for name, value in filter_setting(f).items()}


@pytest.mark.parametrize("order", [*ORDERS, sorted(STEPS - {"mirostat", "adaptive_target"})])
def test_temperature_0_takes_the_likeliest_token_in_every_order_with_every_filter_on(order):
    model = TableLM(vocab_size=14, order=None, end_bias=0.5)
    tokens = [1, 2, 3]
    for _ in range(10):
        logits = model.logits(tokens)
        tokens.append(logits.index(max(logits)))
    for filters in (EVERY_FILTER, *([] if isinstance(order, list) else [{"mirostat": 2}, {"adaptive_target": 0.1}])):
        ((done,),) = sampler(order=order, temperature=0, ignore_eos=True, **filters).generate([1, 2, 3])
        assert done.ids == tokens[3:]


# The forms of generation_config.json.

LEGACY = {  # as older versions wrote it, neutral values and all
    "bad_words_ids": None, "begin_suppress_tokens": None, "bos_token_id": 1, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "exponential_decay_length_penalty": None, "force_words_ids": None,
    "forced_bos_token_id": None, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_scores": False, "pad_token_id": 0,
    "penalty_alpha": None, "renormalize_logits": False, "repetition_penalty": 1.0, "suppress_tokens": None,
    "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "use_cache": True, "transformers_version": "4.30.0",
}  # fmt: skip


def test_neutral_values_of_another_librarys_file_do_nothing():
    config = SamplingConfig.from_dict(LEGACY)
    neutral = sampler(temperature=0, eos_token_id=2)
    assert Sampler(neutral.model, neutral.tokenizer, config).processors_for() == neutral.processors_for()
    assert (config.temperature, config.eos_token_id, config.max_new_tokens) == (0.0, 2, 256)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0}),
        ({"do_sample": True, "num_beams": 4}, {"num_beams": 4, "beam_method": "sample"}),
        ({"do_sample": False, "num_beams": 4}, {"num_beams": 4, "temperature": 0}),
        ({"num_beams": 4, "early_stopping": "never"}, {"num_beams": 4, "early_stopping": "never"}),
        ({"sequence_bias": [[[7, 8], -2.0], [[5], 1.0]]}, {"sequence_bias": [[[7, 8], -2.0], [[5], 1.0]]}),
        ({"stop_strings": "END"}, {"stop": ["END"]}),
        ({"stop_strings": ["END", "\n"]}, {"stop": ["END", "\n"]}),
        ({"logit_bias": {"50256": -5.0}}, {"logit_bias": {50256: -5.0}}),
        ({"eos_token_id": [2, 3], "forced_eos_token_id": 2}, {"eos_token_id": [2, 3], "forced_eos_token_id": 2}),
        ({"exponential_decay_length_penalty": [5, 1.1]}, {"exponential_decay_length_penalty": [5, 1.1]}),
        ({"assistant_early_exit": 3, "watermarking_config": {"a": 1}, "_from_model_config": True}, {}),
    ],
)
def test_forms_of_another_librarys_file(record, expected):
    assert SamplingConfig.from_dict(record) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    "record", [{"logit_bias": {"x": "y"}}, {"top_k": "many"}, {"stop_strings": 3}, {"num_beams": "4"}]
)
def test_a_stored_value_that_cannot_be_used_is_named(record):
    with pytest.raises(ConfigError, match=r"sampling: (logit_bias|top_k|stop|num_beams) is"):
        SamplingConfig.from_dict(record)


def test_temperature_0_is_stored_as_not_sampling():
    record = SamplingConfig(temperature=0).to_dict()
    assert (record["do_sample"], "temperature" in record) == (False, False)
    assert SamplingConfig(temperature=0.5).to_dict()["do_sample"] is True


def test_no_end_token_is_stored_as_such():
    config = SamplingConfig(eos_token_id=[])
    assert SamplingConfig.from_dict(config.to_dict()).eos_token_id == []
    assert sampler(eos_token_id=[], max_new_tokens=40).generate("ab")[0][0].finish_reason == "length"


def test_a_field_accepts_the_value_at_which_it_is_off():
    for spec in fields(SamplingConfig):
        off = spec.metadata["off"]
        assert off is None or spec.metadata["rule"].accepts(off), spec.name
