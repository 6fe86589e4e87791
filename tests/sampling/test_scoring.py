from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data.batches import ValidationWindows
from minigpt.data.stream import TokenStream
from minigpt.errors import ConfigError, NonFiniteError
from minigpt.evaluation.loss import evaluate
from minigpt.sampling import scoring
from minigpt.sampling.loop.loop import stream_rows
from minigpt.sampling.scoring import Score, score_ids
from table_model import FixedLM, TableLM, TableModule
from toys import PRESETS, random_ids, random_model, tiny_config, transformers_twin

INF = math.inf


def text_of(length: int, vocab_size: int = 6, seed: int = 0) -> list[int]:
    return random_ids(1, length, vocab_size, seed=seed)[0].tolist()


def window_start(place: int, context: int, stride: int) -> int:
    """Of the windows at 0, stride, 2 stride, ... that hold the token before the place, the one that begins first."""
    return min(start for start in range(0, place, stride) if start <= place - 1 < start + context)


def reference(model: TableLM, text: list[int], stride: int) -> list[float]:
    """The log-probabilities of all tokens but the first, one window and one token at a time."""
    return [
        math.log(model.probabilities(text[window_start(p, model.max_context, stride) : p])[text[p]])
        for p in range(1, len(text))
    ]


class Watched(TableLM):
    """Remembers the shape of every reading: (rows, tokens, positions whose logits were asked for)."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.readings: list[tuple[int, int, int]] = []

    def next_logits(self, ids, cache, counts=None):
        self.readings.append((*ids.shape, 1))
        return super().next_logits(ids, cache, counts)

    def all_logits(self, ids, cache=None):
        before = len(self.readings)
        logits = super().all_logits(ids, cache)
        self.readings[before:] = [(*ids.shape, ids.shape[1])]
        return logits


def test_every_figure_of_a_text_by_hand():
    model = FixedLM([math.log(1), math.log(2), math.log(5), math.log(2)])
    (score,) = score_ids(model, [[2, 1, 2, 0, 3]], top=2)
    assert score.ids == [2, 1, 2, 0, 3]
    assert score.log_probs[0] is None
    assert score.log_probs[1:] == pytest.approx([math.log(p) for p in (0.2, 0.5, 0.1, 0.2)], abs=1e-6)
    assert score.ranks == [None, 2, 1, 4, 2]
    assert (score.count, score.total) == (4, pytest.approx(math.log(0.2 * 0.5 * 0.1 * 0.2), abs=1e-6))
    assert score.perplexity == pytest.approx((0.2 * 0.5 * 0.1 * 0.2) ** (-1 / 4), rel=1e-6)
    assert score.top[0] == []
    for (first, second), places in zip(score.top[1:], range(4), strict=True):
        assert (first[0], second[0] in (1, 3)) == (2, True), places
        assert (first[1], second[1]) == pytest.approx((math.log(0.5), math.log(0.2)), abs=1e-6)


def test_windows_of_four_tokens_that_move_by_two_by_hand():
    model = TableLM(order=None, max_context=4)
    seen = {
        1: [3],
        2: [3, 1],
        3: [3, 1, 4],
        4: [3, 1, 4, 1],
        5: [4, 1, 5],
        6: [4, 1, 5, 2],
        7: [5, 2, 0],
        8: [5, 2, 0, 5],
    }
    (score,) = score_ids(model, [[3, 1, 4, 1, 5, 2, 0, 5, 3]], stride=2)
    for place, window in seen.items():
        assert score.log_probs[place] == pytest.approx(
            math.log(model.probabilities(window)[score.ids[place]]), abs=1e-5
        )


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
def test_each_token_is_scored_once_in_the_window_with_the_most_context(stride):
    context = 5
    model = TableLM(order=None, max_context=context)
    lengths = {1, 2, context, context + 1, context + 2, context + stride, context + stride + 1, 3 * context + 2}
    texts = [text_of(length, seed=length) for length in sorted(lengths)]
    for text, score in zip(texts, score_ids(model, texts, stride=stride), strict=True):
        assert score.ids == text
        assert score.log_probs[0] is None and score.ranks[0] is None
        assert score.log_probs[1:] == pytest.approx(reference(model, text, stride), abs=1e-5)
        assert score.count == len(text) - 1


def test_a_context_of_one_token_reads_pairs():
    model = TableLM(order=None, max_context=1)
    (score,) = score_ids(model, [[1, 2, 3]])
    expected = [model.probabilities([1])[2], model.probabilities([2])[3]]
    assert score.log_probs[1:] == pytest.approx([math.log(p) for p in expected], abs=1e-5)


def test_a_text_of_one_token_has_nothing_to_score():
    (score,) = score_ids(TableLM(), [[3]], top=1)
    assert (score.log_probs, score.ranks, score.top, score.count, score.total) == ([None], [None], [[]], 0, 0)
    assert math.isnan(score.perplexity)
    assert score_ids(TableLM(), []) == []


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=17), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 60),
    st.data(),
)
def test_a_text_scores_in_any_company_what_it_scores_alone(texts, context, max_tokens, data):
    model = TableLM(order=None, max_context=context)
    stride = data.draw(st.integers(1, context))
    given_tokens = [data.draw(st.integers(1, len(text))) for text in texts]
    together = score_ids(model, texts, context=given_tokens, stride=stride, top=3, max_tokens_a_batch=max_tokens)
    for text, given_count, score in zip(texts, given_tokens, together, strict=True):
        (alone,) = score_ids(model, [text], context=given_count, stride=stride, top=3)
        assert alone == score
        assert score.log_probs[:given_count] == [None] * given_count
        assert score.log_probs[given_count:] == pytest.approx(
            reference(model, text, stride)[given_count - 1 :], abs=1e-5
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gpt_scores_each_text_as_it_does_without_batch_window_and_cache(preset):
    model = random_model(tiny_config(preset, block_size=12)).double()
    texts = [text_of(length, 61, seed=length) for length in (1, 5, 12, 13, 18, 19, 40)]
    for stride in (1, 6, 12):
        for text, score in zip(texts, score_ids(model, texts, stride=stride, max_tokens_a_batch=30), strict=True):
            expected = []
            for place in range(1, len(text)):
                window = torch.tensor([text[window_start(place, 12, stride) : place]])
                with torch.no_grad():
                    expected.append(float(model(window)[0, -1].log_softmax(-1)[text[place]]))
            assert score.log_probs[1:] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_the_mean_is_the_loss_of_transformers(preset):
    model = random_model(tiny_config(preset))
    twin = transformers_twin(model)
    texts = [text_of(length, 61, seed=length) for length in (24, 7, 13)]
    given_tokens = [1, 3, 12]
    for text, first, score in zip(texts, given_tokens, score_ids(model, texts, context=given_tokens), strict=True):
        labels = torch.tensor([[-100] * first + text[first:]])
        with torch.no_grad():
            loss = float(twin(torch.tensor([text]), labels=labels).loss)
        assert -score.total / score.count == pytest.approx(loss, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("length", [24, 25, 26, 60])
def test_windows_side_by_side_give_the_loss_of_evaluation(length, tmp_path):
    model = random_model(tiny_config("modern"))
    text = text_of(length, 61)
    np.array(text, dtype="<u2").tofile(tmp_path / "tokens.bin")
    stream = TokenStream([tmp_path / "tokens.bin"], [length], "uint16", 61)
    result = evaluate(model, ValidationWindows(stream, 24), torch.ones(61, dtype=torch.int64))
    (score,) = score_ids(model, [text], stride=24)
    assert score.count == result.tokens
    assert -score.total == pytest.approx(result.nats, rel=1e-5)


@pytest.mark.parametrize("context", [5, 8, 64])
def test_a_sampled_text_scores_what_sampling_reported(context):
    model = TableLM(order=None, max_context=context)
    prompts = [[1, 2], [3] * 7, [4, 1, 5]]
    for number, prompt in enumerate(prompts):
        events = list(stream_rows(model, [prompt], max_new_tokens=20, seeds=[number], top=3))
        text = prompt + [event.token for event in events]
        (score,) = score_ids(model, [text], context=len(prompt), top=3)
        assert score.log_probs[len(prompt) :] == pytest.approx([event.log_prob for event in events], abs=1e-6)
        assert score.ranks[len(prompt) :] == [event.details.rank for event in events]
        for mine, event in zip(score.top[len(prompt) :], events, strict=True):
            assert [token for token, _ in mine] == [token for token, _ in event.details.top]
            assert [value for _, value in mine] == pytest.approx([value for _, value in event.details.top], abs=1e-6)


def test_the_probabilities_of_all_continuations_add_up_to_one():
    model = random_model(tiny_config("modern", vocab_size=7)).double()
    prompt = [1, 2, 3]
    texts = [prompt + list(pair) for pair in itertools.product(range(7), repeat=2)]
    scores = score_ids(model, texts, context=3)
    assert sum(math.exp(score.total) for score in scores) == pytest.approx(1, rel=1e-12)
    assert {score.count for score in scores} == {2}


def test_batches_and_logits_stay_within_their_bounds(monkeypatch):
    texts = [text_of(length, seed=length) for length in (3, 8, 9, 30, 1, 12, 7, 21)]
    given_tokens = [1, 4, 9, 2, 1, 11, 7, 18]
    for stride, bound in itertools.product((1, 3, 8), (6, 24, 100)):
        free = score_ids(TableLM(order=None, max_context=8), texts, context=given_tokens, stride=stride, top=2)
        model = Watched(order=None, max_context=8)
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", bound)
        bounded = score_ids(model, texts, context=given_tokens, stride=stride, top=2, max_tokens_a_batch=20)
        monkeypatch.undo()
        assert bounded == free
        assert all(rows == 1 or rows * width <= 20 for rows, width, _ in model.readings)
        assert all(rows * places * 6 <= bound for rows, _, places in model.readings)


def test_what_is_only_context_gives_no_logits():
    model = Watched(order=None, max_context=8)
    score_ids(model, [text_of(20)], stride=1, max_tokens_a_batch=1)
    first, *others = model.readings
    assert first == (1, 8, 8), "the whole window at once, without a cache"
    assert others == [(1, 7, 1), (1, 1, 1)] * 11
    model = Watched(order=None, max_context=8)
    score_ids(model, [text_of(40)], context=39)
    assert sum(rows * width for rows, width, _ in model.readings) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_logits_are_widened_before_they_are_normalized(dtype):
    rounded = torch.tensor(TableLM(vocab_size=8).logits([1, 2])).to(dtype)
    exact = rounded.double().log_softmax(-1).tolist()
    (score,) = score_ids(FixedLM(rounded.tolist(), dtype), [[0, 5, 7, 2]])
    assert score.log_probs[1:] == pytest.approx([exact[5], exact[7], exact[2]], rel=1e-6)


def test_equals_share_the_best_rank():
    (score,) = score_ids(FixedLM([2.0, 3.0, 2.0, 1.0, 3.0]), [[0, 0, 1, 2, 3, 4]])
    assert score.ranks == [None, 3, 1, 3, 5, 1]


def test_an_impossible_token_has_probability_zero_and_is_no_candidate():
    possible, impossible = score_ids(FixedLM([0.0, 0.0, -INF]), [[0, 1], [0, 1, 2]], top=3)
    assert impossible.log_probs == [None, pytest.approx(-math.log(2)), -INF]
    assert (impossible.total, impossible.perplexity, impossible.ranks[2]) == (-INF, INF, 3)
    assert sorted(token for token, _ in impossible.top[2]) == [0, 1]
    assert possible.perplexity == pytest.approx(2)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [INF, 1.0], [INF, INF], [-INF, -INF]])
def test_logits_that_are_no_distribution_are_an_error_that_names_the_place(bad):
    class Breaks(TableLM):
        def logits(self, window):
            return bad if window == [1, 0] else [0.0, 0.0]

    with pytest.raises(NonFiniteError, match=r"text 1: .* position 2 .*not a distribution"):
        score_ids(Breaks(vocab_size=2), [[1, 1, 1, 0], [1, 0, 1]])
    assert score_ids(Breaks(vocab_size=2), [[1, 0]])[0].log_probs[1] == pytest.approx(-math.log(2))


def test_modes_and_gradients_are_left_as_they_were():
    class Ungraded(TableModule):
        def all_logits(self, ids, cache=None):
            logits = super().all_logits(ids, cache)
            assert not logits.requires_grad
            return logits

    model = Ungraded(TableLM(order=None, max_context=4))
    model.train()
    model.frozen.eval()
    modes = [module.training for module in model.modules()]
    with torch.enable_grad():
        first = score_ids(model, [text_of(11)], stride=2)
        assert torch.is_grad_enabled()
    assert first == score_ids(model, [text_of(11)], stride=2), "no dropout"
    assert model.gain.grad is None
    model.fail_after = 0
    with pytest.raises(RuntimeError, match="the model broke"):
        score_ids(model, [text_of(11)], stride=2, max_tokens_a_batch=4)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert True in modes and False in modes


def test_no_random_number_is_drawn():
    model = random_model(tiny_config("gpt2", dropout=0.5)).train()
    before = torch.get_rng_state()
    score_ids(model, [text_of(40, 61)])
    assert torch.equal(before, torch.get_rng_state())


def test_arrays_and_tensors_are_texts():
    text = text_of(9)
    expected = score_ids(TableLM(), [text, text], context=[2, 3])
    assert all(isinstance(score, Score) for score in expected)
    for form in (tuple, lambda ids: np.array(ids, dtype=np.uint32), torch.tensor):
        assert score_ids(TableLM(), [form(text)] * 2, context=np.array([2, 3]), stride=np.int64(32)) == expected


def test_progress_counts_the_scored_tokens(monkeypatch):
    told: list = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            told.append("closed")

        def update(self, done):
            told.append(done)

    monkeypatch.setattr(scoring, "progress", lambda *given, show: told.append((given, show)) or Bar())
    score_ids(TableLM(), [text_of(5), text_of(9)], context=2, max_tokens_a_batch=8, show=True)
    assert told == [(("scoring", 10, "tokens"), True), 7, 10, "closed"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 6]], {}, "token id 6 at position 1 is outside the vocabulary of 6 tokens"),
        ([[1, -1]], {}, "token id -1 at position 1"),
        (["abc"], {}, "text 0 is 'abc'; expected a list of token ids; encode it first"),
        ([[1.5]], {}, r"text 0 is '\[1.5\]'; expected a list of token ids"),
        ([[1]], {"stride": 0}, "stride is 0; expected a whole number from 1 to 8"),
        ([[1]], {"stride": 9}, "stride is 9; expected a whole number from 1 to 8"),
        ([[1]], {"stride": 2.0}, r"stride is 2\.0; expected a whole number from 1 to 8"),
        ([[1, 2]], {"context": 0}, "context is 0; expected a whole number from 1 to 2"),
        ([[1, 2, 3], [1]], {"context": 2}, "context is 2; expected a whole number from 1 to 1 .*text 1"),
        ([[1, 2]], {"context": [1, 1]}, "context has 2 numbers for 1 texts"),
        ([[1, 2]], {"context": 1.5}, r"context is 1\.5"),
        ([[1]], {"top": -1}, "top is -1; expected a whole number, 0 or more"),
        ([[1]], {"max_tokens_a_batch": 0}, "max_tokens_a_batch is 0; expected a whole number, 1 or more"),
        ([[1]], {"top": True}, "top is True"),
    ],
)
def test_what_cannot_be_scored_is_an_error(texts, options, message):
    with pytest.raises(ConfigError, match=message):
        score_ids(TableLM(max_context=8), texts, **options)
