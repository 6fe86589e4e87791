from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from minigpt.errors import ConfigError
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.processors.dry import DRY
from minigpt.sampling.processors.penalties import (
    FrequencyPenalty,
    PresencePenalty,
    PromptRepetitionPenalty,
    RepetitionPenalty,
)
from minigpt.sampling.processors.processors import Temperature
from processor_cases import (
    INF,
    assert_well_behaved,
    context_of,
    of_probabilities,
    ragged,
    random_logits,
)
from table_model import TableLM, run

EXAMPLES = [
    RepetitionPenalty(1.3),
    RepetitionPenalty(0.7, "output"),
    RepetitionPenalty(1.3, "prompt", 3),
    RepetitionPenalty(1.3, "both", 4, normalised=True),
    RepetitionPenalty(0.5, normalised=True),
    PromptRepetitionPenalty(1.7),
    PresencePenalty(0.7),
    PresencePenalty(-0.7, "both", 5),
    FrequencyPenalty(0.4),
    FrequencyPenalty(-0.4, "both", 5),
    DRY(0.8),
    DRY(0.8, 1.0, 1, scope="output"),
    DRY(0.8, 2.0, 1, breakers=(3, (1, 2)), window=6),
]


@pytest.mark.parametrize("processor", EXAMPLES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_penalty_treats_rows_alone_keeps_its_input_and_ignores_padding(processor, dtype):
    logits = random_logits(dtype=dtype)
    assert_well_behaved(processor, ragged(), logits, ragged(padding=None))
    result = processor(ragged(), logits)
    assert torch.equal(result == -INF, logits == -INF)
    assert torch.equal(result[:, 6:], logits[:, 6:]), "no token from 6 on was seen"
    assert not torch.equal(result, logits)
    assert not getattr(processor, "shaping", False)


@pytest.mark.parametrize(
    "processor",
    [
        RepetitionPenalty(1),
        RepetitionPenalty(1.0, normalised=True),
        PromptRepetitionPenalty(1.0),
        PresencePenalty(0.0, "both"),
        FrequencyPenalty(0, "both"),
        DRY(0.0, allowed_length=1),
    ],
    ids=repr,
)
def test_neutral_parameters_change_nothing(processor):
    logits = random_logits()
    assert torch.equal(processor(ragged(), logits), logits)


@pytest.mark.parametrize("penalty", [0.4, 1.0, 1.3, 7.5])
def test_repetition_penalties_equal_transformers_row_by_row(penalty):
    logits, context = random_logits(), ragged()
    ours = RepetitionPenalty(penalty)(context, logits)
    prompt = PromptRepetitionPenalty(penalty)(context, logits)
    for row in range(12):
        ids = context.ids[row : row + 1, : context.lengths[row]]
        mine = logits[row : row + 1]
        oracle = theirs.RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(ours[row : row + 1], oracle(ids, mine))
        oracle = theirs.EncoderRepetitionPenaltyLogitsProcessor(penalty, ids[:, : context.prompt_lengths[row]])
        assert torch.equal(prompt[row : row + 1], oracle(ids, mine))


def test_repetition_penalty_by_hand():
    context = context_of([[0, 2, 2, 3]], [2])
    logits = torch.tensor([[4.0, 1.0, -3.0, 0.0, 5.0]])
    assert RepetitionPenalty(2.0)(context, logits).tolist() == [[2.0, 1.0, -6.0, 0.0, 5.0]]
    assert RepetitionPenalty(2.0, "prompt")(context, logits).tolist() == [[2.0, 1.0, -6.0, 0.0, 5.0]]
    assert RepetitionPenalty(2.0, "output")(context, logits).tolist() == [[4.0, 1.0, -6.0, 0.0, 5.0]]
    assert RepetitionPenalty(2.0, window=1)(context, logits).tolist() == [[4.0, 1.0, -3.0, 0.0, 5.0]]
    assert RepetitionPenalty(2.0, "prompt", 1)(context, logits).tolist() == [[4.0, 1.0, -6.0, 0.0, 5.0]]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_a_normalised_repetition_penalty_acts_on_log_probabilities_and_ignores_a_shift(penalty):
    logits, context = random_logits(dtype=torch.float64)[:11], ragged(11)
    processor = RepetitionPenalty(penalty, normalised=True)
    result = processor(context, logits)
    shifted = processor(context, logits + 5)
    assert torch.allclose(result.softmax(-1), shifted.softmax(-1), rtol=1e-9)
    # As the plain penalty does with log-probabilities, none of which is above 0.
    for row in range(11):
        ids = context.ids[row : row + 1, : context.lengths[row]]
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[row : row + 1].log_softmax(-1))
        assert torch.allclose(result[row : row + 1].softmax(-1), expected.softmax(-1), rtol=1e-9)
    raw = RepetitionPenalty(penalty)
    assert not torch.allclose(raw(context, logits).softmax(-1), raw(context, logits + 5).softmax(-1))


@pytest.mark.parametrize(
    ("seen", "repeat", "additive", "expected"),
    [  # llama.cpp: equally likely tokens, the window as long as the text
        ([0], 50.0, 0.0, [0, 0.25, 0.25, 0.25, 0.25]),
        ([0, 1, 2], 50.0, 0.0, [0, 0, 0, 0.5, 0.5]),
        ([0, 1, 2, 0, 0], 50.0, 0.0, [0, 0, 0, 0.5, 0.5]),
        ([0], 1.0, 5.0, [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
        ([0, 1, 2], 1.0, 5.0, [0.000023, 0.000023, 0.000023, 0.499966, 0.499966]),
        ([0, 1, 2, 0, 0], 1.0, 5.0, [0.000000, 0.000023, 0.000023, 0.499977, 0.499977]),
    ],
)
def test_penalties_give_llama_cpps_numbers(seen, repeat, additive, expected):
    processors = [RepetitionPenalty(repeat), PresencePenalty(additive, "both"), FrequencyPenalty(additive, "both")]
    logits = Pipeline(processors)(context_of([seen]), of_probabilities(*[0.2] * 5))
    assert torch.allclose(logits.softmax(-1), torch.tensor([expected], dtype=torch.float64), atol=1e-5)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=4),
    st.data(),
    st.sampled_from(["prompt", "output", "both"]),
    st.one_of(st.none(), st.integers(1, 10)),
)
def test_presence_and_frequency_count_the_tokens_of_their_scope(texts, data, scope, window):
    prompts = [data.draw(st.integers(1, len(text))) for text in texts]
    context = context_of(texts, prompts, padding=data.draw(st.integers(0, 5)))
    logits = torch.zeros(len(texts), 6, dtype=torch.float64)
    presence = PresencePenalty(0.25, scope, window)(context, logits)
    frequency = FrequencyPenalty(0.25, scope, window)(context, logits)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        part = {"prompt": text[:prompt], "output": text[prompt:], "both": text}[scope]
        counts = Counter(part if window is None else part[-window:])
        assert frequency[row].tolist() == [-0.25 * counts[token] for token in range(6)]
        assert presence[row].tolist() == [-0.25 * (counts[token] > 0) for token in range(6)]


def plain_dry(text, multiplier, base, allowed, breakers) -> list[float]:
    """What each of six tokens loses, by trying every place and every length."""
    clear = 0  # how many last tokens lie after the last breaker
    while clear < len(text):
        if any(text[: len(text) - clear][-len(breaker) :] == list(breaker) for breaker in breakers):
            break
        clear += 1
    losses = [0.0] * 6
    for place in range(1, len(text)):
        longest = max(n for n in range(min(place, clear) + 1) if text[place - n : place] == text[len(text) - n :])
        if longest >= allowed and (text[place],) not in breakers:
            losses[text[place]] = max(losses[text[place]], multiplier * base ** (longest - allowed))
    return losses


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=16), min_size=1, max_size=3),
    st.floats(1.0, 3.0),
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple), max_size=2, unique=True),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_dry_equals_its_definition_by_brute_force(texts, base, allowed, breakers, window):
    context = context_of(texts, padding=2)
    result = DRY(0.8, base, allowed, breakers, window=window)(context, torch.zeros(len(texts), 6, dtype=torch.float64))
    for row, text in enumerate(texts):
        expected = plain_dry(text if window is None else text[-window:], 0.8, base, allowed, breakers)
        assert result[row].tolist() == pytest.approx([-loss for loss in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "multiplier", "allowed", "breakers", "expected"),
    [  # llama.cpp, base 1.1
        ([0, 1], 1.0, 2, [], [0.25] * 4),
        ([0, 1, 2, 0, 1], 1.0, 2, [], [0.296923, 0.296923, 0.109232, 0.296923]),
        ([0, 1, 3, 4, 0, 1], 1.0, 2, [[3]], [0.2] * 5),
        ([0, 1, 2, 0, 1], 2.0, 2, [], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
        ([0, 1, 2, 3, 4, 0, 1], 1.0, 4, [], [0.2] * 5),
    ],
)
def test_dry_gives_llama_cpps_numbers(text, multiplier, allowed, breakers, expected):
    logits = of_probabilities(*[1 / len(expected)] * len(expected))
    result = DRY(multiplier, 1.1, allowed, breakers, window=len(text))(context_of([text]), logits)
    assert torch.allclose(result.softmax(-1), torch.tensor([expected], dtype=torch.float64), atol=1e-5)


def test_dry_takes_the_longest_repetition_and_stops_at_breakers():
    logits = torch.zeros(1, 6)
    # "4 1 2" came before 3, "1 2" before 5: lengths 3 and 2
    context = context_of([[4, 1, 2, 3, 0, 1, 2, 5, 4, 1, 2]])
    assert DRY(1.0, 2.0, 2)(context, logits).tolist() == [[0, 0, 0, -2, 0, -1]]
    assert DRY(1.0, 2.0, 2, breakers=[4])(context, logits).tolist() == [[0, 0, 0, -1, 0, -1]]
    assert DRY(1.0, 2.0, 2, breakers=[3])(context, logits).tolist() == [[0, 0, 0, 0, 0, -1]], (
        "breakers are never lowered"
    )
    assert DRY(1.0, 2.0, 2, breakers=[2])(context, logits).tolist() == [[0] * 6], "nothing follows the breaker"
    assert DRY(1.0, 2.0, 2, breakers=[(4, 1)])(context, logits).tolist() == [[0] * 6]
    assert DRY(1.0, 2.0, 1, breakers=[(4, 1)])(context, logits).tolist() == [[0, 0, 0, -1, 0, -1]]


def test_drys_penalty_stays_finite_however_long_the_repetition():
    context = context_of([[1] * 500, [1, 2] * 250])
    result = DRY(1e20, 1.75)(context, torch.zeros(2, 4))
    assert result.isfinite().all()
    assert (result[0, 1] < -1e29) and (result[1, 1] < -1e29)
    assert (result[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (RepetitionPenalty, [0.5, 1.0, 1.3, 3.0]),
        (lambda v: RepetitionPenalty(v, normalised=True), [0.5, 1.0, 1.3, 3.0]),
        (PromptRepetitionPenalty, [0.5, 1.0, 1.3, 3.0]),
        (lambda v: PresencePenalty(v, "both"), [0.5, 0.0, -1.3, 3.0]),
        (lambda v: FrequencyPenalty(v, "both"), [0.5, 0.0, -1.3, 3.0]),
        (DRY, [0.5, 0.0, 1.0, 3.0]),
        (lambda v: DRY(0.8, v, 1), [1.0, 1.1, 1.75, 3.0]),
        (lambda v: DRY(0.8, 1.5, v), [1, 2, 3, 4]),
    ],
)
def test_a_number_for_each_prompt_does_what_it_does_alone(make, values):
    logits = random_logits()
    prompts = (0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 3, 3)
    rows = context_of([[1, 2, 3, 1, 2, 1, 2, 3, 1, 2]] * 12, prompts=prompts)
    together = make(values)(rows, logits)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], make(values[prompt])(rows, logits)[row])


def test_rows_that_end_at_different_times_give_what_they_give_alone():
    model = TableLM(end_bias=0.5)
    processors = [
        RepetitionPenalty(1.4),
        PresencePenalty(0.3),
        FrequencyPenalty(0.2),
        DRY(1.0, 1.5, 1),
        Temperature(0.9),
    ]
    prompts = [[1], [2, 3, 4, 2, 3], [5, 1], [1, 2, 1, 2]]
    together = run(model, prompts, 30, processors=processors, samples=2, end_ids=(0,))
    lengths = {len(tokens) for tokens, _ in together.values()}
    assert len(lengths) > 3
    for i, prompt in enumerate(prompts):
        alone = run(model, [prompt], 30, seeds=[100 + i], processors=processors, samples=2, end_ids=(0,))
        assert [alone[0, 0], alone[0, 1]] == [together[i, 0], together[i, 1]]


def test_greedy_rows_obey_penalties():
    logits = torch.tensor([[1.0, 0.9, -5.0]])
    pipeline = Pipeline([FrequencyPenalty(0.2, "both"), Temperature(0.0)])
    assert pipeline(context_of([[0]]), logits).argmax(-1).tolist() == [1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepetitionPenalty(0.0), "RepetitionPenalty's penalty is 0.0"),
        (lambda: RepetitionPenalty(1.1, "all"), "scope is 'all'; expected 'prompt', 'output' or 'both'"),
        (lambda: RepetitionPenalty(1.1, window=0), "window is 0"),
        (lambda: RepetitionPenalty(1.1, normalised=1), "normalised is 1; expected True or False"),
        (lambda: PromptRepetitionPenalty(-1), "PromptRepetitionPenalty's penalty is -1"),
        (lambda: PresencePenalty(math.inf), "PresencePenalty's penalty is inf"),
        (lambda: FrequencyPenalty([0.1, "x"]), "FrequencyPenalty's penalty is 'x'"),
        (lambda: DRY(-1), "DRY's multiplier is -1"),
        (lambda: DRY(1, 0.5), "DRY's base is 0.5"),
        (lambda: DRY(1, 2, 0), "DRY's allowed_length is 0"),
        (lambda: DRY(1, breakers="\n"), "DRY's breakers are"),
        (lambda: DRY(1, breakers=[[]]), "DRY's breakers is"),
        (lambda: DRY(1, breakers=[-3]), "DRY's breakers is -3"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
