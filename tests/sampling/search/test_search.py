from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beams import every_text, search
from minigpt.errors import ConfigError
from minigpt.sampling.processors.penalties import RepetitionPenalty
from minigpt.sampling.processors.processors import Temperature
from minigpt.sampling.processors.truncation import TopK
from minigpt.sampling.search.search import SearchSettings
from table_model import FixedLM, TableLM, TableModule, run
from toys import random_ids, random_model, tiny_config

INF = math.inf


# By enumeration.


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_beams_enough_for_every_text_find_the_best_ones(early_stopping, length_penalty):
    model = TableLM(vocab_size=4, order=None, end_bias=1.0, dtype=torch.float64)
    texts = every_text(model, [1, 2], 4, end_ids=(0,))
    scores = {text: total / len(text) ** length_penalty for text, total in texts.items()}
    best = sorted(scores, key=lambda text: -scores[text])
    options = {"num_beams": 256, "length_penalty": length_penalty, "early_stopping": early_stopping}
    (found,) = search(model, [[1, 2]], 4, end_ids=[0], **options)
    assert [tuple(hypothesis.tokens) for hypothesis in found] == best
    for hypothesis in found:
        text = tuple(hypothesis.tokens)
        assert hypothesis.score == pytest.approx(scores[text])
        assert hypothesis.log_prob == pytest.approx(texts[text])
        assert hypothesis.finish_reason == ("end" if text[-1] == 0 else "length")


def test_a_search_of_eight_texts_by_hand():
    """Greedy takes token 1 (0.6) and ends at 0.6 * 0.55 = 0.33; token 0 leads to 0.4 * 0.9 = 0.36."""

    class Two(TableLM):
        def logits(self, window):
            return [math.log(p) for p in {0: (0.9, 0.1), 1: (0.45, 0.55)}.get(window[-1], (0.4, 0.6))]

    model = Two(vocab_size=3, dtype=torch.float64)
    model.logits = lambda window: [*Two.logits(model, window), -INF]
    (found,) = search(model, [[2]], 2, num_beams=2, length_penalty=0.0)
    assert [hypothesis.tokens for hypothesis in found] == [[0, 0], [1, 1]]
    assert [math.exp(hypothesis.score) for hypothesis in found] == pytest.approx([0.36, 0.33])


# Identities.


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 3), st.sampled_from([3, 6, 64]), st.sampled_from([False, True]))
def test_one_beam_is_greedy(length, ends, context, early_stopping):
    model = TableLM(max_context=context, order=None, end_bias=0.5, dtype=torch.float64)
    prompts = [[1], [2, 3, 4], [5, 4, 3, 2, 1]]
    found = search(model, prompts, length, end_ids=range(ends), num_beams=1, early_stopping=early_stopping)
    greedy = run(model, prompts, length, processors=[Temperature(0)], end_ids=range(ends))
    assert [(best.tokens, best.finish_reason) for (best,) in found] == [greedy[i, 0] for i in range(3)]


METHODS = [
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": True, "length_penalty": -0.5},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7},
    {"num_beams": 4, "method": "sample"},
    {"num_beams": 4, "method": "stochastic"},
]


@pytest.mark.parametrize("context", [7, 64])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_prompt_finds_what_it_finds_alone_and_in_any_place(method, context):
    model = TableLM(max_context=context, order=None, end_bias=1.0, dtype=torch.float64)
    prompts = [[1, 2], [3], [4, 4, 4, 1, 2], [5, 1], [3]]
    options = {"end_ids": [0], "processors": [RepetitionPenalty(1.2)], **method}
    seeds = [7, 8, 9, 10, 11]
    together = search(model, prompts, 9, seeds=seeds, **options)
    assert method != METHODS[0] or len({len(best.tokens) for found in together for best in found}) > 3
    for i, prompt in enumerate(prompts):
        assert search(model, [prompt], 9, seeds=[seeds[i]], **options) == [together[i]]
    order = [3, 1, 4, 0, 2]
    shuffled = search(model, [prompts[i] for i in order], 9, seeds=[seeds[i] for i in order], **options)
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("preset", ["gpt2", "llama", "modern"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scores_are_those_of_the_texts_read_anew(method, preset):
    model = random_model(tiny_config(preset, block_size=12)).double()
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (2, 5)]
    for prompt, found in zip(prompts, search(model, prompts, 7, end_ids=range(9), **method), strict=True):
        assert len({tuple(hypothesis.tokens) for hypothesis in found}) >= len(found) - method.get("num_beams", 0)
        for hypothesis in found:
            with torch.no_grad():
                logits = model.all_logits(torch.tensor([prompt + hypothesis.tokens]))[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            each = log_probs.gather(1, torch.tensor(hypothesis.tokens)[:, None])[:, 0]
            assert hypothesis.log_probs == pytest.approx(each.tolist())
            if "diversity_penalty" in method:
                continue
            assert hypothesis.log_prob == pytest.approx(float(each.sum()))
            if method.get("method") != "stochastic":
                penalty = method.get("length_penalty", 1.0)
                assert hypothesis.score == pytest.approx(hypothesis.log_prob / len(hypothesis.tokens) ** penalty)


@pytest.mark.parametrize("context", [5, 64])
def test_beams_that_move_take_their_cache_and_their_memory_along(context):
    """Logits depend on every token in view, and a processor forbids what its own memory holds."""

    class Unrepeated:
        def start(self, context):
            return torch.full((len(context.rows), 2), -1)

        def __call__(self, context, logits, state):
            ends = [context.ids[row, : context.lengths[row]].tolist() for row in range(len(context.rows))]
            written = [e[int(n) :][-2:] for e, n in zip(ends, context.prompt_lengths, strict=True)]
            assert [[t for t in row if t >= 0] for row in state.tolist()] == written
            for column in state.unbind(1):
                logits = logits.masked_fill(torch.arange(logits.shape[1]) == column[:, None], -INF)
            return logits

        def accept(self, state, tokens, raw, processed):
            assert processed.gather(1, tokens[:, None]).min() > 0
            return torch.stack((state[:, 1], tokens), dim=1)

    model = TableLM(max_context=context, order=None, scale=0.5, dtype=torch.float64)
    prompts = [[1, 2], [3], [4, 4, 4]]
    for method in METHODS:
        for prompt, found in zip(prompts, search(model, prompts, 8, [Unrepeated()], [0], **method), strict=True):
            for hypothesis in found:
                text = hypothesis.tokens
                assert all(token not in text[max(0, i - 2) : i] for i, token in enumerate(text))
                start = {n: 0 if n <= context else -(-(n - context) // 2) * 2 for n in range(20)}
                for place, token in enumerate(text):
                    before = [*prompt, *text[:place]]
                    window = before[start[len(before)] :]
                    assert hypothesis.log_probs[place] == pytest.approx(math.log(model.probabilities(window)[token]))


def test_feeding_logits_adds_up_the_log_probabilities_of_what_the_processors_make_of_them():
    model = TableLM(vocab_size=4, order=None, dtype=torch.float64)

    def lower_ones(context, logits):
        logits[:, 1] -= 3
        return logits

    def twisted(window):
        return [logit - 3 * (token == 1) for token, logit in enumerate(model.logits(window))]

    other = TableLM(vocab_size=4, order=None, dtype=torch.float64)
    other.logits = twisted
    (found,) = search(model, [[1, 2]], 4, [lower_ones], num_beams=3, feed="logits")
    (expected,) = search(other, [[1, 2]], 4, num_beams=3)
    assert [(f.tokens, f.score) for f in found] == [(e.tokens, pytest.approx(e.score)) for e in expected]
    (summed,) = search(model, [[1, 2]], 4, [lower_ones], num_beams=3)
    for hypothesis in summed:
        assert hypothesis.log_prob == pytest.approx(sum(hypothesis.log_probs) - 3 * hypothesis.tokens.count(1))


def test_what_only_shapes_the_distribution_is_left_out_where_nothing_is_drawn():
    model = TableLM(order=None)
    shaped = search(model, [[1]], processors=[Temperature(0.1), TopK(1)], num_beams=3)
    assert shaped == search(model, [[1]], num_beams=3)


# Ends.


def test_every_beam_may_end_at_once_and_with_the_first_token():
    (found,) = search(FixedLM([9.0, 0.0, -1.0]), [[1]], 5, end_ids=[0], num_beams=1)
    assert [(best.tokens, best.finish_reason) for best in found] == [([0], "end")]
    (found,) = search(FixedLM([9.0, 8.0, 8.5]), [[1]], 5, end_ids=[0, 1, 2], num_beams=3, early_stopping=True)
    assert [best.tokens for best in found] == [[0], [2], [1]]
    assert {best.finish_reason for best in found} == {"end"}


def test_more_beams_than_a_vocabulary_has_tokens():
    model = TableLM(vocab_size=2, dtype=torch.float64)
    (found,) = search(model, [[1]], 3, num_beams=7)
    texts = every_text(model, [1], 3)
    assert [tuple(best.tokens) for best in found] == sorted(texts, key=lambda text: -texts[text])[:7]
    assert len(search(model, [[1]], 1, num_beams=7)[0]) == 2


def test_a_prompt_that_is_done_is_no_longer_read():
    model = TableLM(order=None, end_bias=2.0)
    found = search(model, [[1, 2], [3], [4]], 30, end_ids=[0], num_beams=2, early_stopping=True)
    lengths = [max(len(best.tokens) for best in own) for own in found]
    assert len(set(lengths)) > 1
    assert model.rows_read[0] == 3
    assert model.rows_read[1] == 6
    assert model.rows_read[-1] == 2 * lengths.count(max(lengths))
    assert len(model.rows_read) == max(lengths)


def test_stop_strings_end_a_text_as_end_tokens_do():
    model = TableLM(order=None, dtype=torch.float64)
    ended = search(model, [[1, 2], [3]], 9, end_ids=[0], num_beams=3)
    stopped = search(model, [[1, 2], [3]], 9, stopped=lambda prompt, written: written[-1] == 0, num_beams=3)
    assert [[best.tokens for best in own] for own in stopped] == [[best.tokens for best in own] for own in ended]
    reasons = {best.finish_reason for own in stopped for best in own}
    assert "stop" in reasons and "end" not in reasons
    seen = set()
    search(model, [[1, 2], [3]], 2, stopped=lambda prompt, written: bool(seen.add((prompt, len(written)))), num_beams=2)
    assert seen == {(0, 1), (0, 2), (1, 1), (1, 2)}


def test_reasons_to_end_without_an_end_token():
    model = TableLM(max_context=6, order=None)
    found = search(model, [[1, 2], [3] * 5, [4] * 6], 5, overflow="stop", num_beams=2)
    assert [(len(own[0].tokens), own[0].finish_reason) for own in found] == [
        (4, "context"),
        (1, "context"),
        (0, "context"),
    ]
    assert search(model, [[1]], 0, num_beams=2)[0][0].finish_reason == "length"
    found = search(model, [[1], [1]], [2, 4], num_beams=2)
    assert [len(own[0].tokens) for own in found] == [2, 4]
    assert search(model, [], 3, num_beams=2) == []


def test_dead_beams_leave_and_a_prompt_without_any_is_an_error_that_names_the_processor():
    model = TableLM(order=None, dtype=torch.float64)

    def forbid(context, logits):
        for row, (prompt, n) in enumerate(zip(context.rows, context.positions, strict=True)):
            if prompt == 1 and n == 4:
                logits[row] = -INF
            elif prompt == 0:
                logits[row, : int(context.ids[row, n - 1]) + 1] = -INF  # tokens rise, until none is left
        return logits

    for method in METHODS:
        rising, dead, other = search(model, [[0], [3, 3], [4]], 7, [forbid], **method)
        assert [best.finish_reason for best in dead] == ["error"]
        assert "forbid left no token" in dead[0].error and "position 4" in dead[0].error
        assert rising[0].finish_reason == "error"
        assert all(math.isfinite(best.score) and best.finish_reason == "length" for best in other)
        rising = search(model, [[0]], 3, [forbid], **method)[0]
        assert all(a < b for best in rising for a, b in itertools.pairwise(best.tokens))
        assert all(math.isfinite(best.score) for best in rising)


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, -INF, -INF]])
@pytest.mark.parametrize("feed", ["logits", "log_probs"])
def test_logits_that_are_no_numbers_blame_the_model(bad, feed):
    for method in METHODS:
        ((found,),) = search(FixedLM(bad), [[0]], feed=feed, **method)
        assert found.finish_reason == "error"
        assert "the model's logits" in found.error


def test_an_infinite_score_is_no_choice():
    def prefer_absolutely(context, logits):
        return logits.index_fill(1, torch.tensor([2]), INF)

    for method in METHODS:
        ((found,),) = search(TableLM(), [[0]], 3, [prefer_absolutely], **method)
        assert found.finish_reason == "error" and "prefer_absolutely left no token" in found.error


# The surroundings.


def test_modes_gradients_and_global_randomness_are_left_alone():
    model = TableModule(TableLM())
    before = torch.get_rng_state()
    for method in METHODS:
        found = search(model, [[1]], 4, **method)
        assert model.training and model.drop.training and not model.frozen.training
        assert found == search(TableLM(), [[1]], 4, **method)
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    model.fail_after = 2
    with pytest.raises(RuntimeError, match="the model broke"):
        search(model, [[1]], 4, num_beams=2)
    assert model.training


def test_fresh_seeds_differ_and_repeat_the_search():
    options = {"num_beams": 3, "method": "stochastic"}
    found = search(TableLM(), [[1], [1]], 9, seeds=[None, None], **options)
    assert found[0] != found[1]
    assert search(TableLM(), [[1], [1]], 9, seeds=[own[0].seed for own in found], **options) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences is 3; expected at most num_beams \(2\)"),
        ({"num_beams": 4, "num_beam_groups": 3}, r"num_beams is 4; expected a multiple of num_beam_groups \(3\)"),
        ({"num_beams": 4, "num_beam_groups": 2, "method": "sample"}, "num_beam_groups is 2; expected 1 with"),
        ({"num_beams": 4, "method": "stochastic", "length_penalty": 2.0}, "length_penalty is 2.0"),
        ({"num_beams": 4, "early_stopping": 1}, "early_stopping is 1; expected True, False or 'never'"),
        ({"num_beams": 4, "method": "best"}, "method is 'best'"),
        ({"num_beams": 4, "length_penalty": math.nan}, "length_penalty is nan"),
    ],
)
def test_settings_that_cannot_be_used_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        SearchSettings(**fields)


def test_bad_prompts_and_seeds_are_errors():
    model = TableLM(max_context=6)
    with pytest.raises(ConfigError, match="prompt 0 has no tokens"):
        search(model, [[]], num_beams=2)
    with pytest.raises(ConfigError, match="seed is -3"):
        search(model, [[1]], seeds=[-3], num_beams=2)
    with pytest.raises(ConfigError, match="max_new_tokens is -1"):
        search(model, [[1]], -1, num_beams=2)
    with pytest.raises(ConfigError, match="max_new_tokens has 2 values"):
        search(model, [[1]], [1, 2], num_beams=2)
    with pytest.raises(ConfigError, match=r"7 tokens.*context is 6"):
        search(model, [[0] * 7], overflow="stop", num_beams=2)
