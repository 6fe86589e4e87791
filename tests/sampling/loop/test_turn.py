"""What is told of each turn, and that a row's turns are its own: in any batch, budget and company, replayed or not."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import PER_PROMPT, SamplingConfig
from minigpt.sampling.settings.shape import FILTERS
from processor_cases import context_of, filter_values
from table_model import FixedLM, LetterTokenizer, TableLM
from toys import random_ids, random_model, tiny_config

INF = math.inf


def gpt(preset: str = "modern", **settings) -> Sampler:
    """A random model of 61 tokens and a context of 24, in float64."""
    model = random_model(tiny_config(preset)).double()
    defaults = {"max_new_tokens": 12, "seed": 3, "temperature": 1.0, "ignore_eos": True}
    return Sampler(model, LetterTokenizer(61), SamplingConfig(**{**defaults, **settings}))


def table(**settings) -> Sampler:
    """A table of 9 tokens that looks at all of a context of 10."""
    model = TableLM(vocab_size=9, order=None, max_context=10, scale=1.5, end_bias=1.0)
    defaults = {"max_new_tokens": 14, "seed": 5, "temperature": 1.0}
    return Sampler(model, LetterTokenizer(9), SamplingConfig(**{**defaults, **settings}))


RAGGED = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 1, 7, 5, 2)]
MEMORIES = {
    "none": {},
    "mirostat 1": {"mirostat": 1, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 1.5, "mirostat_eta": 0.5},
    "adaptive": {"adaptive_target": 0.2, "adaptive_decay": 0.5},
    "history": {"dry_multiplier": 1.0, "dry_allowed_length": 1, "repetition_penalty": 1.3, "frequency_penalty": 0.3},
    "chance": {"xtc_probability": 0.5, "xtc_threshold": 0.05, "dynatemp_range": 0.5, "min_p": 0.02},
}


# Details.


@torch.no_grad()
def test_details_are_those_of_plain_torch():
    sampler = gpt(temperature=0.7, top_k=6, top_p=0.9, top_logprobs=4)
    for (done,) in sampler.generate(RAGGED):
        tokens = list(done.prompt_ids)
        for token, log_prob, details in zip(done.ids, done.log_probs, done.details, strict=True):
            z = sampler.model.all_logits(torch.tensor([tokens]))[0, -1]
            before = z.log_softmax(-1)
            cool = z / 0.7
            cool[cool < cool.sort().values[-6]] = -INF
            falling, ids = cool.softmax(-1).sort(descending=True)
            cool[ids[falling.cumsum(-1) - falling >= 0.9]] = -INF
            after = cool.log_softmax(-1)
            assert log_prob == pytest.approx(float(before[token]), abs=1e-9)
            assert details.processed_log_prob == pytest.approx(float(after[token]), abs=1e-9)
            assert details.rank == sorted(z.tolist(), reverse=True).index(float(z[token])) + 1
            for told, exact in ((details.top, before), (details.processed_top, after)):
                likeliest = sorted(range(61), key=lambda v: -float(exact[v]))[:4]
                assert [one for one, _ in told] == [one for one in likeliest if exact[one] > -INF]
                assert all(value == pytest.approx(float(exact[one]), abs=1e-9) for one, value in told)
            tokens.append(token)


def test_equally_likely_tokens_share_the_best_rank():
    sampler = Sampler(FixedLM([1.0, 1.0, 2.0, 0.0, 1.0]), LetterTokenizer(5), SamplingConfig(ignore_eos=True))
    completion = sampler.replay([[1]], [[0, 1, 2, 3, 4]])[0]
    assert [details.rank for details in completion.details] == [2, 2, 1, 5, 2]


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_may_be_chosen_has_a_probability_of_1_together(memory):
    for (done,) in table(top_logprobs=9, **MEMORIES[memory]).generate(["ab", "c"]):
        for token, log_prob, details in zip(done.ids, done.log_probs, done.details, strict=True):
            assert sum(math.exp(value) for _, value in details.top) == pytest.approx(1, abs=1e-6)
            assert sum(math.exp(value) for _, value in details.processed_top) == pytest.approx(1, abs=1e-6)
            assert dict(details.top)[token] == log_prob
            assert dict(details.processed_top)[token] == details.processed_log_prob
            for told in (details.top, details.processed_top):
                values = [value for _, value in told]
                assert values == sorted(values, reverse=True)


def test_details_are_told_only_where_asked_for():
    assert table().generate("ab")[0][0].details is None
    ((done,),) = table(top_logprobs=0).generate("ab")
    assert [(details.top, details.processed_top) for details in done.details] == [((), ())] * len(done.ids)


# Replay.


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_replay_tells_what_the_generation_of_the_same_tokens_told(memory):
    for sampler, prompts in (
        (table(**MEMORIES[memory]), ["ab", "cdefga", "h" * 13]),
        (gpt(**MEMORIES[memory]), RAGGED),
    ):
        written = [done for (done,) in sampler.generate(prompts, top_logprobs=3, max_new_tokens=20)]
        assert any(len(done.prompt_ids) + len(done.ids) > sampler.model.max_context for done in written), "none slides"
        replayed = sampler.replay(prompts, [done.ids for done in written], top_logprobs=3)
        for then, now in zip(written, replayed, strict=True):
            assert (now.ids, now.text) == (then.ids, then.text)
            assert now.log_probs == pytest.approx(then.log_probs, abs=1e-9)
            for a, b in zip(then.details, now.details, strict=True):
                assert a.rank == b.rank
                assert b.processed_log_prob == pytest.approx(a.processed_log_prob, abs=1e-6)
                assert dict(b.processed_top) == pytest.approx(dict(a.processed_top), abs=1e-6)


def test_a_replay_writes_what_no_processor_would_let_through():
    sampler = table(top_k=1, stop=["b"], max_new_tokens=1)
    forced = [[1, 2, 3], [], [8]]
    first, none, last = sampler.replay(["a", "b", "c"], forced)
    assert [first.ids, none.ids, last.ids] == forced
    assert first.finish_reason == none.finish_reason == "length"
    assert [done.text for done in (first, none, last)] == ["abc", "", "h"]
    told = [details.processed_log_prob for done in (first, last) for details in done.details]
    assert set(told) <= {0.0, -INF}
    assert -INF in told


# Work.


def test_work_is_the_processors_applied_one_by_one():
    settings = {
        "temperature": 0.6, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.4, "logit_bias": {3: 2.0, 4: -INF},
        "min_new_tokens": 2, "no_repeat_ngram_size": 1,
    }  # fmt: skip
    sampler = table(max_new_tokens=4, **settings)
    ((done,),) = sampler.generate("ab", show_work=9)
    processors, _ = sampler.processors_for()
    tokens = list(done.prompt_ids)
    for token, stages in zip(done.ids, done.work, strict=True):
        context = context_of([tokens], [2], end_ids=(0,), seeds=[5])
        logits = torch.tensor([sampler.model.logits(tokens[-10:])])
        exact = [logits, *(logits := one(context, logits) for one in processors)]
        assert [stage.name for stage in stages] == ["model", *(type(one).__name__ for one in processors)]
        for place, (stage, now) in enumerate(zip(stages, exact, strict=True)):
            was, here = exact[max(0, place - 1)][0] > -INF, now[0] > -INF
            assert stage.possible == here.sum()
            assert stage.removed == (was & ~here).sum()
            assert [stage.probabilities[v] for v in range(9)] == pytest.approx(now[0].softmax(-1).tolist(), abs=1e-6)
        tokens.append(token)


def test_what_comes_back_does_not_hide_what_is_removed():
    sampler = table(logit_bias={3: -INF}, forced_bos_token_id=3)
    ((done,),) = sampler.generate("ab", max_new_tokens=1, show_work=2)
    assert [(stage.name, stage.possible, stage.removed) for stage in done.work[0]] == [
        ("model", 9, 0),
        ("LogitBias", 8, 1),
        ("ForcedFirst", 1, 8),
    ]
    assert done.ids == [3]


@pytest.mark.parametrize("memory", MEMORIES)
def test_work_begins_with_the_models_probability_and_ends_with_that_of_the_choice(memory):
    for (done,) in table(top_logprobs=2, **MEMORIES[memory]).generate(["ab", "cdefga"], show_work=2):
        for token, log_prob, details, stages in zip(done.ids, done.log_probs, done.details, done.work, strict=True):
            assert stages[0].probabilities[token] == pytest.approx(math.exp(log_prob), abs=1e-6)
            assert stages[-1].probabilities[token] == pytest.approx(math.exp(details.processed_log_prob), abs=1e-6)
            shown = {one for one, _ in details.top + details.processed_top} | {token}
            assert shown <= stages[0].probabilities.keys()
            assert all(stage.probabilities.keys() == stages[0].probabilities.keys() for stage in stages)


def test_showing_work_and_details_changes_no_text():
    for memory in MEMORIES.values():
        told = table(**memory).generate(["ab", "c"], show_work=3, top_logprobs=2)
        plain = table(**memory).generate(["ab", "c"])
        assert [done.ids for (done,) in told] == [done.ids for (done,) in plain]


# Budgets, and rows that come and go.


PROMPTS = ["ab", "c", "abcdefg", "hgf", "a", "bcbcbcbcbcbc"]


BUDGETS = [{"max_rows": 1}, {"max_rows": 2}, {"max_rows": 5}, {"max_batch_tokens": 21}, {"max_batch_tokens": 1}]


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_budget_changes_nothing_but_how_much_is_done_at_once(memory):
    sampler = table(num_return_sequences=2, top_logprobs=2, **MEMORIES[memory])
    expected = sampler.generate(PROMPTS)
    for budget in BUDGETS:
        sampler.model.rows_read.clear()
        assert sampler.generate(PROMPTS, **budget) == expected
        most = budget.get("max_rows") or max(1, budget["max_batch_tokens"] // sampler.model.max_context)
        assert max(sampler.model.rows_read) <= most


class Measured(TableLM):
    """Notes the room of its caches whenever they are read."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.room: list[int] = []

    def next_logits(self, ids, cache, counts=None):
        self.room.append(len(cache.keys) * cache.capacity)
        return super().next_logits(ids, cache, counts)


@pytest.mark.parametrize("tokens", [24, 40, 100])
def test_the_caches_stay_within_their_budget(tokens):
    model = Measured(vocab_size=9, order=None)
    sampler = Sampler(model, LetterTokenizer(9), SamplingConfig(max_new_tokens=8, seed=1, ignore_eos=True))
    expected = sampler.generate(PROMPTS, num_return_sequences=3)
    assert max(model.room) > 100
    model.room.clear()
    assert sampler.generate(PROMPTS, num_return_sequences=3, max_batch_tokens=tokens) == expected
    assert max(model.room) <= tokens


def test_a_length_and_endings_for_each_prompt():
    sampler = table(ignore_eos=True)
    lengths = [0, 3, 14, 7, 1, 14]
    stops = [[], ["a"], ["b", "cd"], [], ["e"], ["f"]]
    together = sampler.generate(PROMPTS, max_new_tokens=lengths, stop=stops, seed=[5] * 6)
    assert {done.finish_reason for (done,) in together} == {"length", "stop"}
    for prompt, length, stop, row in zip(PROMPTS, lengths, stops, together, strict=True):
        assert row == sampler.generate(prompt, max_new_tokens=length, stop=stop)[0]
    assert sampler.generate(PROMPTS, max_new_tokens=lengths, stop=stops, seed=[5] * 6, max_rows=2) == together


class Counting:
    """A model that notes how many rows it is given."""

    def __init__(self, model) -> None:
        self.model, self.rows = model, []
        self.vocab_size, self.max_context = model.vocab_size, model.max_context
        self.new_cache, self.all_logits = model.new_cache, model.all_logits

    def next_logits(self, ids, cache, counts=None):
        self.rows.append(len(ids))
        return self.model.next_logits(ids, cache, counts)


@pytest.mark.parametrize("preset", ["gpt2", "modern"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_leave_a_gpts_batch_as_they_end_and_the_others_go_on_as_alone(preset, memory):
    sampler = gpt(preset, ignore_eos=False, eos_token_id=list(range(9)), max_new_tokens=30, **MEMORIES[memory])
    sampler.model = Counting(sampler.model)
    together = [done for (done,) in sampler.generate(RAGGED)]
    lengths = [len(done.ids) for done in together]
    assert len(set(lengths)) > 2, "the rows are meant to end at different times"
    running = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert sampler.model.rows == running
    for prompt, done in zip(RAGGED, together, strict=True):
        ((alone,),) = sampler.generate([prompt], seed=done.seed)
        assert (alone.ids, alone.finish_reason) == (done.ids, done.finish_reason)
        assert alone.log_probs == pytest.approx(done.log_probs, abs=1e-9)


# A value for each prompt.

DRY_ON = {"dry_multiplier": 2.0}
EACH = {  # field -> what it needs beside it, and three values that make three different distributions or texts
    "max_new_tokens": ({}, [0, 3, 12]),
    "min_new_tokens": ({}, [None, 5, 9]),
    "min_length": ({}, [8, None, 11]),
    "seed": ({}, [5, 6, 7]),
    "temperature": ({}, [0, 0.5, 2.0]),
    "dynatemp_range": ({"temperature": 1.5}, [0.5, None, 1.0]),
    "dynatemp_exponent": ({"dynatemp_range": 0.7}, [0.5, None, 2.0]),
    "smoothing_factor": ({}, [None, 0.1, 0.8]),
    "smoothing_curve": ({"smoothing_factor": 0.3}, [1.5, None, 3]),
    "top_k": ({}, [2, None, 5]),
    "top_p": ({}, [0.4, 0.9, None]),
    "min_p": ({}, [0.5, None, 0.1]),
    "typical_p": ({}, [None, 0.3, 0.9]),
    "epsilon_cutoff": ({}, [0.2, None, 0.05]),
    "eta_cutoff": ({}, [None, 0.9, 0.1]),
    "top_a": ({}, [0.5, None, 1.0]),
    "tail_free": ({}, [0.2, None, 0.9]),
    "top_n_sigma": ({}, [0.5, None, 1.5]),
    "top_h": ({}, [0.3, None, 0.8]),
    "xtc_probability": ({"xtc_threshold": 0.05}, [1.0, None, 0.4]),
    "xtc_threshold": ({"xtc_probability": 1.0}, [0.02, 0.06, 0.15]),
    "adaptive_decay": ({"adaptive_target": 0.3}, [0.1, 0.5, 0.9]),
    "mirostat_tau": ({"mirostat": 2}, [1.0, 2.0, 3.0]),
    "mirostat_eta": ({"mirostat": 1, "mirostat_tau": 2.5}, [0.0, 0.4, 1.5]),
    "repetition_penalty": ({}, [None, 1.3, 0.6]),
    "encoder_repetition_penalty": ({}, [1.5, None, 0.6]),
    "presence_penalty": ({}, [None, 0.7, -0.7]),
    "frequency_penalty": ({}, [0.4, None, -0.4]),
    "dry_multiplier": ({"dry_allowed_length": 1}, [None, 0.5, 2.0]),
    "dry_base": ({**DRY_ON, "dry_allowed_length": 1}, [1.0, 1.5, 4.0]),
    "dry_allowed_length": (DRY_ON, [1, 2, 3]),
    "no_repeat_ngram_size": ({}, [1, None, 2]),
    "encoder_no_repeat_ngram_size": ({}, [1, None, 2]),
}
EACH |= {name: ({}, filter_values(name)) for name in FILTERS if name not in EACH and name in PER_PROMPT}
REPETITIVE = ["ababab", "cabca", "ba"]


def letters() -> Sampler:
    model = TableLM(vocab_size=14, order=None, scale=1.5, end_bias=1.5)
    return Sampler(
        model, LetterTokenizer(14), SamplingConfig(temperature=1, seed=1, max_new_tokens=12, top_logprobs=14)
    )


def test_every_field_that_may_differ_from_prompt_to_prompt_is_tried():
    assert EACH.keys() == set(PER_PROMPT)


def _differ(results: list) -> bool:
    return all(a != b for a, b in combinations(results, 2))


@pytest.mark.parametrize("name", EACH)
def test_a_list_of_one_value_for_each_prompt_is_single_calls(name):
    companions, values = EACH[name]
    sampler = letters()
    alone = [[sampler.generate(one, **companions, **{name: value})[0] for one in REPETITIVE] for value in values]
    pick = next((c for c in combinations(range(len(values)), 3) if _differ([alone[i] for i in c])), None)
    assert pick, "no three of the values make three different results"
    values, alone = [values[i] for i in pick], [alone[i] for i in pick]
    for turn in range(3):
        each = values[turn:] + values[:turn]
        same = {} if name == "seed" else {"seed": [1, 1, 1]}
        together = sampler.generate(REPETITIVE, **companions, **same, **{name: each if turn else tuple(each)})
        assert together == [alone[values.index(value)][i] for i, value in enumerate(each)]


def test_temperature_0_beside_a_dynamic_temperature_is_greedy():
    sampler = letters()
    together = sampler.generate(REPETITIVE, temperature=[0, 1.0, 1.3], dynatemp_range=[None, None, 0.5], seed=[1, 1, 1])
    assert together[0] == sampler.generate(REPETITIVE[0], temperature=0)[0]
    assert together[1] == sampler.generate(REPETITIVE[1], temperature=1.0)[0]
    assert together[2] == sampler.generate(REPETITIVE[2], temperature=1.3, dynatemp_range=0.5)[0]


def test_a_forced_end_beside_a_prompt_that_writes_nothing():
    for forced in (3, 9):
        rows = letters().generate(REPETITIVE, forced_eos_token_id=forced, max_new_tokens=[0, 1, 4], ignore_eos=True)
        assert [len(done.ids) for (done,) in rows] == [0, 1, 4]
        assert {done.ids[-1] for (done,) in rows[1:]} == {forced}
