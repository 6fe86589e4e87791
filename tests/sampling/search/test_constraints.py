from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beams import every_text, search
from minigpt.errors import ConfigError
from minigpt.sampling.search.constraints import Phrases
from minigpt.sampling.search.search import SearchSettings, search_rows
from table_model import TableLM


def appears(phrase, text) -> bool:
    return any(list(text[i : i + len(phrase)]) == list(phrase) for i in range(len(text)))


def complete(constraints, text) -> bool:
    return all(any(appears(phrase, text) for phrase in alternatives) for alternatives in constraints)


def progress_of(phrases: Phrases, text):
    progress = phrases.start
    for token in text:
        progress = phrases.after(progress, token)
    return progress


some_constraints = st.lists(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=2), min_size=1, max_size=3
)


# How far a text has come.


def test_a_broken_match_goes_on_with_what_still_holds():
    phrases = Phrases([[[5, 5, 6]]])
    assert [phrases.need(progress_of(phrases, (5, 5, 5, 6)[:n])) for n in range(5)] == [3, 2, 1, 1, 0]
    phrases = Phrases([[[1, 2, 1, 3]]])
    assert [phrases.need(progress_of(phrases, (1, 2, 1, 2, 1, 3)[:n])) for n in range(7)] == [4, 3, 2, 1, 2, 1, 0]


def test_alternatives_share_what_they_begin_with_and_phrases_may_overlap():
    phrases = Phrases([[[1, 2, 3], [1, 2, 4, 4]]])
    assert phrases.nearer(progress_of(phrases, (1, 2))) == {3}
    assert phrases.need(progress_of(phrases, (1, 2, 4))) == 1
    assert phrases.nearer(progress_of(phrases, (1, 2, 4))) == {4}
    phrases = Phrases([[[1, 2]], [[2, 3]]])
    assert phrases.need(phrases.start) == 3
    assert phrases.nearer(phrases.start) == {1}
    assert phrases.need(progress_of(phrases, (1, 2, 3))) == 0
    assert phrases.need(progress_of(phrases, (2, 3))) == 2


@settings(max_examples=120, deadline=None, database=None, derandomize=True)
@given(some_constraints, st.lists(st.integers(0, 3), max_size=6))
def test_progress_is_what_looking_through_the_text_finds(constraints, text):
    phrases = Phrases(constraints)
    progress = progress_of(phrases, text)
    assert progress.met == {
        i for i, alternatives in enumerate(constraints) if any(appears(phrase, text) for phrase in alternatives)
    }
    beginnings = [phrase[:n] for alternatives in constraints for phrase in alternatives for n in range(len(phrase) + 1)]
    assert len(progress.begun) == max(n for n in range(len(text) + 1) if text[len(text) - n :] in beginnings)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(some_constraints, st.lists(st.integers(0, 3), max_size=3))
def test_the_need_is_the_length_of_the_shortest_completion(constraints, text):
    phrases = Phrases(constraints)
    progress = progress_of(phrases, text)
    need = phrases.need(progress)
    seen = {progress}  # breadth first over the automaton, one token at a time
    steps = 0
    while not any(len(p.met) == len(constraints) for p in seen):
        seen |= {phrases.after(p, token) for p in seen for token in range(4)}
        steps += 1
    assert need == steps
    assert all(phrases.need(phrases.after(progress, token)) == need - 1 for token in phrases.nearer(progress))
    assert bool(phrases.nearer(progress)) == (need > 0)


def test_with_many_constraints_some_token_still_brings_every_text_nearer():
    phrases = Phrases([[[i % 4, i % 3, i], [i, i]] for i in range(12)])
    progress = phrases.start
    for _ in range(phrases.need(progress)):
        before = phrases.need(progress)
        if before == 0:
            break
        progress = phrases.after(progress, min(phrases.nearer(progress)))
        assert phrases.need(progress) < before
    assert len(progress.met) == 12


# The search.


@pytest.mark.parametrize(
    "constraints",
    [[[[1]]], [[[1, 2]], [[2, 3]]], [[[3, 3, 1], [2, 2]]], [[[1], [2]], [[3, 1]]], [[[2, 2, 1]]], [[[1, 0]]]],
    ids=str,
)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_enough_for_every_text_find_the_best_complete_ones(constraints, length_penalty):
    model = TableLM(vocab_size=4, order=None, end_bias=1.0, dtype=torch.float64)
    texts = every_text(model, [1, 2], 4, end_ids=(0,))
    scores = {text: total / len(text) ** length_penalty for text, total in texts.items() if complete(constraints, text)}
    best = sorted(scores, key=lambda text: -scores[text])
    options = {"num_beams": 256, "length_penalty": length_penalty, "constraints": [constraints]}
    (found,) = search(model, [[1, 2]], 4, end_ids=[0], **options)
    assert [tuple(hypothesis.tokens) for hypothesis in found] == best
    assert [hypothesis.score for hypothesis in found] == pytest.approx([scores[text] for text in best])
    assert all(hypothesis.complete for hypothesis in found)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    st.lists(some_constraints, min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([True, False, "never"]),
    st.sampled_from([0.0, 4.0]),
)
def test_what_must_appear_does_however_few_the_beams_and_tight_the_room(constraints, beams, spare, early, end_bias):
    model = TableLM(vocab_size=5, order=None, scale=4.0, end_bias=end_bias, max_context=9, dtype=torch.float64)
    prompts = [[4], [3, 2, 1], [1, 1]][: len(constraints)]
    room = [Phrases(own).need(Phrases.start) + spare for own in constraints]
    options = {"num_beams": beams, "early_stopping": early, "seeds": [1], "end_ids": [0]}
    together = search(model, prompts, room, **{**options, "seeds": [1] * len(prompts)}, constraints=constraints)
    for i, found in enumerate(together):
        assert found
        for best in found:
            assert best.complete and complete(constraints[i], best.tokens) and len(best.tokens) <= room[i]
            assert 0 not in best.tokens[:-1] and (best.finish_reason == "end") == (best.tokens[-1] == 0)
        assert [best.score for best in found] == sorted((best.score for best in found), reverse=True)
        assert search(model, [prompts[i]], [room[i]], **options, constraints=[constraints[i]]) == [found]


def test_a_phrase_stands_where_it_costs_least():
    """Texts that have begun a phrase have a share of the beams, and so have those that put it off."""
    model = TableLM(vocab_size=5, order=2, scale=3.0, dtype=torch.float64)
    places = set()
    for prompt in ([1, 2], [3], [4, 0]):
        texts = every_text(model, prompt, 5)
        for phrase in ([4, 1], [2, 3], [0, 2], [3, 1], [1, 4], [2, 2], [4, 0]):
            best = max((text for text in texts if appears(phrase, text)), key=lambda text: texts[text])
            (found,) = search(model, [prompt], 5, num_beams=16, constraints=[[[phrase]]])
            assert tuple(found[0].tokens) == best
            places.add(next(i for i in range(4) if appears(phrase, best[: i + 2])))
    assert len(places) > 2


def test_no_constraints_are_a_plain_search():
    model = TableLM(order=None, end_bias=1.0)
    plain = search(model, [[1], [2]], end_ids=[0], num_beams=3)
    assert search(model, [[1], [2]], end_ids=[0], num_beams=3, constraints=[[], []]) == plain
    mixed = search(model, [[1], [2]], end_ids=[0], num_beams=3, constraints=[[], [[[3, 3]]]])
    assert mixed[0] == plain[0]
    assert all(appears([3, 3], best.tokens) for best in mixed[1])


def test_without_a_complete_text_the_least_incomplete_are_given_and_marked():
    model = TableLM(order=None, end_bias=1.0, dtype=torch.float64)

    def without_three(context, logits):
        return logits.index_fill(1, torch.tensor([3]), -math.inf)

    options = {"num_beams": 4, "num_return_sequences": 2, "constraints": [[[[3]], [[5, 5]]]]}
    (found,) = search(model, [[1]], 6, [without_three], [0], **options)
    assert len(found) == 2
    for best in found:
        assert not best.complete and best.finish_reason in ("length", "end") and best.error is None
        assert appears([5, 5], best.tokens) and 3 not in best.tokens
    (full,) = search(model, [[1] * 7], 6, overflow="stop", num_beams=2, constraints=[[[[3]]]])[0][:1]
    assert full.complete
    small = TableLM(max_context=8, order=None)
    (cut,) = search(small, [[1] * 7], 6, overflow="stop", num_beams=2, constraints=[[[[3, 4]]]])[0][:1]
    assert (cut.complete, cut.finish_reason, len(cut.tokens)) == (False, "context", 1)
    (none,) = search(small, [[1] * 8], 6, overflow="stop", num_beams=2, constraints=[[[[3, 4]]]])[0]
    assert (none.complete, none.finish_reason, none.tokens) == (False, "context", [])


def test_an_ending_that_comes_too_early_does_not_count():
    """The end is all but certain at every step, and yet the text goes on until it is complete."""
    model = TableLM(order=None, end_bias=30.0, dtype=torch.float64)
    (found,) = search(model, [[1]], 9, end_ids=[0], num_beams=2, early_stopping=True, constraints=[[[[4, 4, 2]]]])
    assert [best.finish_reason for best in found] == ["end", "end"]
    assert found[0].tokens == [4, 4, 2, 0]
    stopped = search_rows(
        model,
        [[1]],
        SearchSettings(2),
        max_new_tokens=9,
        stopped=lambda prompt, written: written[-1] == 0,
        constraints=[[[[4, 4, 2]]]],
    )
    assert (stopped[0][0].tokens, stopped[0][0].finish_reason) == ([4, 4, 2, 0], "stop")


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ([[[[9]]]], r"phrase \[9\]; expected ids below the vocabulary size of 6"),
        ([[[[1, 0, 2]]]], r"phrase \[1, 0, 2\].*end token \(\[0\]\) only at its end"),
        ([[[]]], r"constraint 0 is \[\]"),
        ([[[[]]]], r"constraint 0 is \[\[\]\]"),
        ([[[["a"]]]], r"constraint 0 is \[\['a'\]\]"),
        ([[[[1, 2]], [[3, 4, 5]]]], "need 5 tokens, but max_new_tokens is 4"),
        ([[], []], "constraints for 2 prompts; expected one list for each of 1"),
    ],
)
def test_constraints_that_cannot_be_met_are_named(constraints, message):
    with pytest.raises(ConfigError, match=message):
        search(TableLM(), [[1]], 4, end_ids=[0], num_beams=2, constraints=constraints)


@pytest.mark.parametrize("options", [{"method": "sample"}, {"method": "stochastic"}, {"num_beam_groups": 2}])
def test_constraints_need_a_plain_beam_search(options):
    with pytest.raises(ConfigError, match="constraints need method 'beam'"):
        search(TableLM(), [[1]], num_beams=2, constraints=[[[[1]]]], **options)


def test_every_pair_of_overlapping_phrases_fits_in_the_least_room():
    model = TableLM(vocab_size=4, order=None, dtype=torch.float64)
    words = list(itertools.product((1, 2), repeat=3))
    for a, b in itertools.combinations(words, 2):
        room = Phrases([[a], [b]]).need(Phrases.start)
        ((found,),) = search(model, [[3]], room, num_beams=1, constraints=[[[a], [b]]])
        assert found.complete and appears(a, found.tokens) and appears(b, found.tokens)


def test_no_beam_is_spent_on_a_text_that_can_no_longer_be_complete():
    """Of the sixteen texts of two tokens five can hold (1, 2) after a third: five beams then find the best five."""
    for prompt in ([3], [0], [1, 2], [2, 2]):
        model = TableLM(vocab_size=4, order=None, dtype=torch.float64)
        texts = every_text(model, prompt, 3)
        best = sorted((text for text in texts if appears([1, 2], text)), key=lambda text: -texts[text])
        (found,) = search(model, [prompt], 3, num_beams=5, constraints=[[[[1, 2]]]])
        assert [tuple(hypothesis.tokens) for hypothesis in found] == best[:5]
