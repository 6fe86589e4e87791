"""From settings to what is drawn: whole calls of the sampler, against transformers and written-out answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.sampling.processors import borders, truncation
from minigpt.sampling.processors.adaptive import AdaptiveP, Mirostat1, Mirostat2
from minigpt.sampling.processors.dry import DRY
from minigpt.sampling.processors.penalties import FrequencyPenalty, PresencePenalty, RepetitionPenalty
from minigpt.sampling.processors.processors import Filter, Normalised
from minigpt.sampling.processors.scaling import DynamicTemperature, QuadraticSmoothing
from minigpt.sampling.processors.xtc import XTC
from minigpt.sampling.recipe import spellings
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings import shape
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.settings.orders import CUSTOM, ORDERS, STEPS
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from processor_cases import filter_values
from table_model import FixedLM, LetterTokenizer, ScriptLM, TableLM
from toys import needs_transformers, random_model, tiny_config, transformers_twin

PAD = 60  # the last id of the models: transformers' padding, beyond our tokenizer
PROMPTS = [[7, 3, 7], [5], [11, 12, 13, 11, 12], [2, 2, 9, 4]]
NEW = 12


class Pair:
    """Our model in float64, transformers' with the same weights, and the end that our first row writes as its fifth."""

    def __init__(self, preset: str) -> None:
        model = random_model(tiny_config(preset))
        self.twin = transformers_twin(model).double()
        self.model = model.double()
        self.endless = self.ours(PROMPTS, ignore_eos=True)
        self.end = self.endless[0][4]
        self.plain = self.ours(PROMPTS)

    def ours(self, prompts, **settings) -> list[list[int]]:
        settings.setdefault("eos_token_id", getattr(self, "end", None))
        sampler = Sampler(self.model, LetterTokenizer(PAD), SamplingConfig(temperature=0, max_new_tokens=NEW))
        return [completion.ids for (completion,) in sampler.generate(prompts, **settings)]

    def theirs(self, prompts, **settings) -> list[list[int]]:
        padded, mask = left_padded(prompts)
        settings.setdefault("eos_token_id", self.end)
        settings["suppress_tokens"] = [PAD, *settings.get("suppress_tokens", [])]
        written = self.twin.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, **settings
        )
        ends = np.atleast_1d(settings["eos_token_id"]).tolist()
        return [until(row, ends) for row in written[:, padded.shape[1] :].tolist()]


def left_padded(rows):
    width = max(map(len, rows))
    padded = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return padded, (padded != PAD).long()


def until(tokens: list[int], ends: list[int]) -> list[int]:
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request) -> Pair:
    return Pair(request.param)


# Each changes what at least one row writes.
GREEDY = {
    "repetition_penalty": lambda p: {"repetition_penalty": 1.6},
    "encoder_repetition_penalty": lambda p: {"encoder_repetition_penalty": 4.0},
    "no_repeat_ngram_size": lambda p: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda p: {"bad_words_ids": [[p.plain[0][1]], p.plain[2][1:3], p.plain[3][:1], [p.end]]},
    "sequence_bias": lambda p: {
        "sequence_bias": [[[PROMPTS[0][-1], p.plain[0][0]], -9.0], [[8], 2.5], [[8, 8], -3.0], [[9, 8, 8], 4.0]]
    },
    "min_new_tokens": lambda p: {"min_new_tokens": 9},
    "forced_eos_token_id": lambda p: {"forced_eos_token_id": 17},
    "forced_eos_token_id of several": lambda p: {"forced_eos_token_id": [18, 17]},
    "exponential_decay_length_penalty": lambda p: {
        "exponential_decay_length_penalty": [2, 1.5],
        "eos_token_id": [33, 34],
    },
    "suppress_tokens": lambda p: {"suppress_tokens": [p.plain[0][0], p.plain[1][1]]},
    "begin_suppress_tokens": lambda p: {"begin_suppress_tokens": [p.plain[0][0], p.plain[1][0]]},
    "several ends": lambda p: {"eos_token_id": [p.end, p.endless[1][6], p.endless[2][2]], "min_new_tokens": 2},
    "all at once": lambda p: {
        "repetition_penalty": 1.3,
        "encoder_repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[p.plain[0][1]], p.plain[2][1:3], [p.end]],
        "sequence_bias": [[[8], 1.5], [[8, 8], -3.0]],
        "min_new_tokens": 4,
        "forced_eos_token_id": 17,
        "exponential_decay_length_penalty": [5, 1.2],
        "suppress_tokens": [p.plain[3][0]],
        "begin_suppress_tokens": [p.plain[0][0], p.plain[1][0]],
    },
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_with_deterministic_processors_writes_the_tokens_of_transformers(pair, case):
    settings = GREEDY[case](pair)
    ours = pair.ours(PROMPTS, **settings)
    assert ours == pair.theirs(PROMPTS, **settings)
    assert ours != pair.plain


def test_greedy_of_a_ragged_batch_writes_the_tokens_of_transformers(pair):
    assert pair.plain == pair.theirs(PROMPTS)
    assert len({len(tokens) for tokens in pair.plain}) > 1, "a row is meant to end early"


@pytest.mark.parametrize("size", [1, 2])
def test_no_repetition_of_the_prompt_is_that_of_transformers(pair, size):
    prompts = [[7, 3, 7], [5, 8], [11, 12, 13, 11, 12], [2, 2, 9, 4]]
    pairs = [prompt[:2] for prompt in prompts]
    settings = {"sequence_bias": [*([first[:1], 9.0] for first in pairs), *([first, 30.0] for first in pairs)]}
    ours = pair.ours(prompts, encoder_no_repeat_ngram_size=size, **settings)
    assert ours == pair.theirs(prompts, encoder_no_repeat_ngram_size=size, **settings)
    assert ours != pair.ours(prompts, **settings)


def test_min_length_counts_a_prompts_own_tokens(pair):
    # transformers counts the padding of a batch too, so that each prompt stands alone there.
    ours = pair.ours(PROMPTS, min_length=10)
    assert ours == [pair.theirs([prompt], min_length=10)[0] for prompt in PROMPTS]
    assert ours != pair.plain


def test_a_forced_first_token_is_that_of_transformers_after_one_token(pair):
    prompts = [[5], [9], [30]]
    assert pair.ours(prompts, forced_bos_token_id=21) == pair.theirs(prompts, forced_bos_token_id=21)
    assert {tokens[0] for tokens in pair.ours(PROMPTS, forced_bos_token_id=21)} == {21}


FILTERS = {
    "temperature": 1.3,
    "top_h": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.03,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.03,
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, marks=needs_transformers(">=5", "before, it has no top-h") if "top_h" in names else ())
        for names in [*[[name] for name in FILTERS], list(FILTERS)]
    ],
    ids="+".join,
)
def test_drawing_is_from_the_distribution_of_transformers(pair, names):
    given = {"temperature": 1.0, **{name: FILTERS[name] for name in names}}
    sampler = Sampler(pair.model, LetterTokenizer(PAD), SamplingConfig(max_new_tokens=6, seed=3, ignore_eos=True))
    completions = [done for (done,) in sampler.generate(PROMPTS[:3], top_logprobs=PAD, **given)]
    prefixes = [done.prompt_ids + done.ids[:n] for done in completions for n in range(6)]
    told = [details for done in completions for details in done.details]
    padded, mask = left_padded(prefixes)
    with torch.random.fork_rng():
        scores = pair.twin.generate(
            padded,
            attention_mask=mask,
            do_sample=True,
            max_new_tokens=1,
            pad_token_id=PAD,
            suppress_tokens=[PAD],
            return_dict_in_generate=True,
            output_scores=True,
            **{"top_k": 0, **given},
        ).scores[0]
    for log_probs, details in zip(scores.log_softmax(-1).tolist(), told, strict=True):
        ours = dict(details.processed_top)
        assert ours.keys() == {token for token, value in enumerate(log_probs) if value > -math.inf}
        assert all(value == pytest.approx(log_probs[token], abs=1e-5) for token, value in ours.items())
    assert names == ["temperature"] or any(len(details.processed_top) < PAD for details in told)


# What each setting makes.

MADE = [
    ({"repetition_penalty": 1.2}, RepetitionPenalty(1.2, "both", None, False)),
    (
        {"repetition_penalty": 1.2, "repetition_scope": "prompt", "penalty_window": 7, "repetition_normalised": True},
        RepetitionPenalty(1.2, "prompt", 7, True),
    ),
    ({"presence_penalty": 0.5}, PresencePenalty(0.5, "output", None)),
    ({"frequency_penalty": 0.5, "penalty_scope": "both", "penalty_window": 9}, FrequencyPenalty(0.5, "both", 9)),
    ({"dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3, "dry_window": 40}, DRY(0.8, 2, 3, (), "both", 40)),
    ({"top_k": 3}, truncation.TopK(3)),
    ({"top_k": 3, "exact_top_k": True}, truncation.ExactTopK(3)),
    ({"mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.2}, Mirostat1(3.0, 0.2)),
    ({"mirostat": 2}, Mirostat2(5.0, 0.1)),
    ({"adaptive_target": 0.3, "adaptive_decay": 0.5}, AdaptiveP(0.3, 0.5)),
    ({"temperature": 0.7, "dynatemp_range": 0.2, "dynatemp_exponent": 2}, DynamicTemperature(0.7, 0.2, 2)),
    ({"smoothing_factor": 0.2, "smoothing_curve": 1.5}, QuadraticSmoothing(0.2, 1.5)),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, XTC(0.5, 0.2)),
    ({"top_n_sigma": 1.5}, borders.TopNSigma(1.5)),
    ({"top_a": 0.2}, borders.TopA(0.2)),
    ({"tail_free": 0.9}, truncation.TailFree(0.9)),
    ({"p_less": True}, borders.PLess()),
    ({"renormalize_logits": True}, Normalised()),
]


@pytest.mark.parametrize(("settings", "expected"), MADE)
def test_every_part_of_a_setting_reaches_its_processor(settings, expected):
    sampler = Sampler(TableLM(), LetterTokenizer(6), SamplingConfig(temperature=1))
    assert sampler.processors_for(**settings)[0] == [expected]


# The order.


def test_every_order_has_the_same_steps():
    for order in ORDERS.values():
        assert sorted(order.steps) == sorted(ORDERS["transformers"].steps)
        assert len(set(order.steps)) == len(order.steps)
    assert CUSTOM in STEPS


def distribution(probabilities, **settings) -> dict[int, float]:
    """What the next token is drawn from."""
    model = FixedLM([math.log(p) for p in probabilities])
    config = SamplingConfig(max_new_tokens=1, ignore_eos=True, seed=0, top_logprobs=len(probabilities))
    ((done,),) = Sampler(model, LetterTokenizer(len(probabilities)), config).generate([1], **settings)
    return {token: round(math.exp(value), 4) for token, value in done.details[0].processed_top}


HALVES = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]


def test_min_p_is_before_top_p_in_vllm_and_after_it_in_transformers():
    settings = {"temperature": 1.0, "top_p": 0.85, "min_p": 0.25}
    # 1/2 + 1/4 + 1/8 reach 0.85, and 1/8 is a quarter of 1/2.
    assert distribution(HALVES, **settings) == {0: 0.5714, 1: 0.2857, 2: 0.1429}
    assert distribution(HALVES, order="llama_cpp", **settings) == {0: 0.5714, 1: 0.2857, 2: 0.1429}
    # Of the three that min-p leaves, 4/7 + 2/7 = 0.857 reach 0.85.
    assert distribution(HALVES, order="vllm", **settings) == {0: 0.6667, 1: 0.3333}


def test_the_temperature_is_last_in_llama_cpp_and_first_elsewhere():
    settings = {"temperature": 2.0, "min_p": 0.25}
    # At temperature 2 the shares are as the roots: 0.7071 0.5 0.3536 0.25 0.25; all are a quarter of the first.
    flat = {0: 0.3431, 1: 0.2426, 2: 0.1716, 3: 0.1213, 4: 0.1213}
    assert distribution(HALVES, **settings) == flat
    assert distribution(HALVES, order="vllm", **settings) == flat
    # At temperature 1 min-p keeps three, and then 0.7071 0.5 0.3536 are shared out.
    assert distribution(HALVES, order="llama_cpp", **settings) == {0: 0.4531, 1: 0.3204, 2: 0.2265}


def test_a_bias_comes_before_a_penalty_in_every_preset():
    """z = 1 with a bias of 1 and a penalty of 2 is (1 + 1) / 2 = 1 in every preset, but 1 / 2 + 1 in a list."""
    model = FixedLM([0.0, 1.0])
    for order, expected in (
        *((name, 1.0) for name in ORDERS),
        (["logit_bias", "repetition_penalty"], 1.0),
        (["repetition_penalty", "logit_bias"], 1.5),
    ):
        config = SamplingConfig(temperature=1, max_new_tokens=1, ignore_eos=True, seed=0, top_logprobs=2, order=order)
        sampler = Sampler(model, LetterTokenizer(2), config)
        ((done,),) = sampler.generate([1], logit_bias={1: 1.0}, repetition_penalty=2.0)
        top = dict(done.details[0].processed_top)
        assert top[1] - top[0] == pytest.approx(expected, abs=1e-6)


def test_a_list_is_followed_step_by_step():
    settings = {"temperature": 2.0, "min_p": 0.25, "top_p": 0.85}
    assert distribution(HALVES, order=["min_p", "top_p", "temperature"], **settings) == {0: 0.5858, 1: 0.4142}
    assert distribution(HALVES, order=["top_p", "min_p", "temperature"], **settings) == {
        0: 0.4531,
        1: 0.3204,
        2: 0.2265,
    }
    with pytest.raises(ConfigError, match="min_p is set, but order does not list it"):
        distribution(HALVES, order=["temperature", "top_p"], **settings)


def test_own_processors_stand_where_the_order_says_or_first():
    def doubled(context, logits):
        return logits * 2

    def logits_of(order, **settings):
        config = SamplingConfig(temperature=1, max_new_tokens=1, ignore_eos=True, seed=0, top_logprobs=2, order=order)
        sampler = Sampler(FixedLM([0.0, 1.0]), LetterTokenizer(2), config, processors=[doubled])
        ((done,),) = sampler.generate([0], **settings)
        top = dict(done.details[0].processed_top)
        return pytest.approx(top[1] - top[0], abs=1e-6)

    bias = {"logit_bias": {1: 1.0}}
    assert logits_of("transformers", **bias) == 4.0
    assert logits_of(["logit_bias", CUSTOM], **bias) == 4.0
    assert logits_of([CUSTOM, "logit_bias"], **bias) == 3.0
    assert logits_of(["logit_bias"], **bias) == 3.0


# Texts in settings, spelled by a tokenizer.


@pytest.fixture(scope="module")
def bpe():
    text = "the cat sat on the mat. the cat ate the rat.\nthe hat: a cat in a hat.\n" * 20
    return build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=290), lambda: [text], show=False)


@pytest.fixture(scope="module", params=["bpe", "byte"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else build_tokenizer(TokenizerConfig(kind="byte"))


def scripted(tokenizer, text: str, **settings) -> Sampler:
    """Sure to write the text after a prompt of one token, but for what is forbidden."""
    model = ScriptLM([tokenizer.encode("the")[0], *tokenizer.encode(text)], vocab_size=tokenizer.vocab_size)
    return Sampler(model, tokenizer, SamplingConfig(temperature=1, seed=0, **settings))


def test_bad_words_are_not_written_alone_or_after_a_space(tokenizer):
    for text, word in ((" cat sat", "cat"), ("cat sat", "cat"), (" sat\n", "\n")):
        length = len(tokenizer.encode(text))
        prompt = tokenizer.encode("the")[:1]
        ((free,),) = scripted(tokenizer, text, max_new_tokens=length).generate(prompt)
        assert free.text == text
        ((done,),) = scripted(tokenizer, text, max_new_tokens=length, top_logprobs=300).generate(
            prompt, bad_words=[word]
        )
        spelled = [tokenizer.encode(form) for form in (word, " " + word)]
        ended = [any(free.ids[: n + 1][-len(ids) :] == ids for ids in spelled) for n in range(length)]
        first = ended.index(True)  # up to here the two agree
        assert done.ids[:first] == free.ids[:first]
        assert free.ids[first] not in dict(done.details[first].processed_top)


def test_a_word_has_its_spelling_after_a_space_too(bpe):
    assert len(spellings(bpe, "cat")) == 2
    assert {bpe.decode(ids) for ids in spellings(bpe, "cat")} == {"cat", " cat"}
    byte = build_tokenizer(TokenizerConfig(kind="byte"))
    assert spellings(byte, "cat") == [(99, 97, 116)]


def test_breakers_are_all_tokens_that_hold_the_text_and_its_spellings_of_several_tokens(tokenizer):
    texts = ["\n", ":", "a cat"]
    config = SamplingConfig(dry_multiplier=1.0, dry_sequence_breakers=texts, temperature=1)
    sampler = Sampler(TableLM(vocab_size=tokenizer.vocab_size), tokenizer, config)
    ((dry,), _) = sampler.processors_for()
    assert isinstance(dry, DRY)
    singles = {b[0] for b in dry.breakers if len(b) == 1}
    several = {b for b in dry.breakers if len(b) > 1}
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size - 1)]
    assert singles == {
        token for token, piece in enumerate(pieces) if b"\n" in piece or b":" in piece or b"a cat" in piece
    }
    assert several
    assert {tokenizer.decode(ids).removeprefix(" ") for ids in several} <= set(texts)


def test_a_breaker_ends_what_counts_as_repeated():
    byte = build_tokenizer(TokenizerConfig(kind="byte"))
    script = [*b"abc\nab", *b"cd"]
    prompt = list(b"abc\nab")
    settings = {"max_new_tokens": 1, "top_logprobs": 1, "dry_multiplier": 100.0}
    sampler = Sampler(ScriptLM(script), byte, SamplingConfig(temperature=0))
    assert sampler.generate(prompt, max_new_tokens=1)[0][0].text == "c"
    assert sampler.generate(prompt, **settings)[0][0].text != "c", "ab was followed by c before"
    for breaker, text in (("b", "c"), ("\n", "x"), ("a", "c")):
        done = sampler.generate(prompt, dry_sequence_breakers=[breaker], **settings)[0][0]
        assert (done.text == "c") == (text == "c")


def test_forced_words_are_in_the_best_beam(tokenizer):
    sampler = scripted(tokenizer, " sat on the mat", max_new_tokens=8, num_beams=3, ignore_eos=True)
    prompt = tokenizer.encode("the")[:1]
    for given, expected in ((["cat"], ["cat"]), ([["rat", "hat"]], ["rat", "hat"])):
        ((done,),) = sampler.generate(prompt, force_words=given)
        assert any(word in done.text for word in expected)
    assert "cat" not in sampler.generate(prompt)[0][0].text


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0, 1.0, 9.0])
def test_ids_beyond_the_tokenizer_are_never_drawn(order, temperature):
    model = FixedLM([0.0, 0.0, 0.0, 50.0, 60.0])
    config = SamplingConfig(ignore_eos=True, temperature=temperature, max_new_tokens=15, order=order, top_logprobs=5)
    sampler = Sampler(model, LetterTokenizer(3), config)
    for settings in ({}, {"logit_bias": {4: 100.0}}, {"top_k": 2}, {"sequence_bias": [[[3], 9.0]], "top_p": 0.1}):
        ((done,),) = sampler.generate("a", **settings)
        assert set(done.ids) <= {0, 1, 2}
        assert all(token < 3 for details in done.details for token, _ in details.processed_top)
    if temperature:
        ((searched,),) = sampler.generate("a", num_beams=2, max_new_tokens=5, top_logprobs=None)
        assert set(searched.ids) <= {0, 1, 2}


# Drawing beams need tokens to draw from.

STRICT = {
    **{"top_k": 1, "top_p": 0.0, "min_p": 1.0, "top_a": 1.0, "epsilon_cutoff": 0.99, "eta_cutoff": 0.99},
    **{"typical_p": 1e-3, "tail_free": 0.0, "top_n_sigma": 1e-6, "top_h": 1e-3, "p_less": True},
    **{"xtc_probability": 1.0, "exact_top_k": True},
}
ENDS = {name: [filter_values(name)[0], filter_values(name)[-1]] for name in shape.FILTERS}
ENDS |= {name: [value] for name, value in STRICT.items()}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("method", ["sample", "stochastic"])
def test_every_filter_leaves_drawing_beams_as_many_texts_as_they_are_asked_for(name, method):
    """The end has nearly all of the probability: what leaves the end alone leaves one text."""
    settings = {"num_beams": 3, "beam_method": method, "num_return_sequences": 3, "temperature": 1.0, "seed": 1}
    strict = {"exact_top_k": {"top_k": 1}, "xtc_probability": {"xtc_threshold": 0.01}}.get(name, {})
    sampler = Sampler(FixedLM([30.0, 22.0, 20.0, 1.0]), LetterTokenizer(4))
    for value in ENDS[name]:
        (found,) = sampler.generate("a", max_new_tokens=4, **settings, **strict, **{name: value})
        assert len({tuple(done.ids) for done in found}) == 3
        assert [done.missing for done in found] == [0] * 3


def test_the_settings_above_are_those_of_every_filter():
    sampler = Sampler(TableLM(), LetterTokenizer(6), SamplingConfig(temperature=1))
    made = [type(p) for name, vs in ENDS.items() for p in sampler.processors_for(**{"top_k": 1, name: vs[0]})[0]]
    assert set(made) == set(Filter.__subclasses__())


def test_a_search_that_finds_fewer_texts_than_asked_for_says_so():
    sampler = Sampler(FixedLM([1.0, 2.0, 3.0, 4.0]), LetterTokenizer(4))
    beams = {"num_beams": 3, "num_return_sequences": 3}
    (found,) = sampler.generate("a", max_new_tokens=1, allowed_token_ids=[1, 2], **beams)
    assert [(done.text, done.missing) for done in found] == [("b", 1), ("a", 1)]
    (nothing,) = sampler.generate("a", max_new_tokens=0, **beams)
    assert [(done.text, done.missing) for done in nothing] == [("", 2)]
    (failed,) = sampler.generate("a", max_new_tokens=2, suppress_tokens=[0, 1, 2, 3], **beams)
    assert [(done.finish_reason, done.missing) for done in failed] == [("error", 3)]
