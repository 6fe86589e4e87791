from __future__ import annotations

import math

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.sampling.loop.loop import stream_rows
from minigpt.sampling.loop.pipeline import Pipeline, gather_state
from minigpt.sampling.processors.adaptive import AdaptiveP, Mirostat1, Mirostat2
from minigpt.sampling.processors.processors import Temperature
from processor_cases import (
    INF,
    assert_distribution,
    assert_well_behaved,
    call,
    context_of,
    kept,
    of_probabilities,
    ragged,
    random_logits,
)
from table_model import FixedLM, TableLM, run

ONE = context_of([[0]])
PER_PROMPT = [1.0, 2.0, 3.0] * 4
EXAMPLES = [
    Mirostat1(2.0),
    Mirostat1(0.5, 0.2, m=7),
    Mirostat1(PER_PROMPT),
    Mirostat2(1.0),
    Mirostat2(PER_PROMPT, [0.1, 0.2] * 6),
    AdaptiveP(0.3),
    AdaptiveP([0.1, 0.5, 0.9] * 4, 0.5),
]


@pytest.mark.parametrize("processor", EXAMPLES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_adaptive_processor_treats_rows_alone_and_keeps_its_input(processor, dtype):
    logits = random_logits(dtype=dtype)
    assert_well_behaved(processor, ragged(), logits, ragged(padding=None))
    result = call(processor, ragged(), logits)
    assert torch.equal(result == -INF, (result == -INF) | (logits == -INF))
    assert (result > -INF).any(-1).all()
    assert type(processor).shaping


@pytest.mark.parametrize("processor", EXAMPLES, ids=repr)
def test_states_are_never_changed_and_go_with_their_rows(processor):
    logits, context = random_logits(), ragged()
    first = processor.start(context)
    copies = [part.clone() for part in first]
    raw, processed = logits.softmax(-1), processor(context, logits, first).softmax(-1)
    tokens = processed.argmax(-1)
    second = processor.accept(first, tokens, raw, processed)
    assert all(map(torch.equal, first, copies))
    rows = [5, 0, 2]
    part = processor.accept(gather_state(first, rows), tokens[rows], raw[rows], processed[rows])
    assert all(map(torch.equal, part, gather_state(second, rows)))


@pytest.mark.parametrize("exponent", [0.4, 0.999999, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("tau", [0.3, 1.0, 2.2])
def test_mirostat_1_finds_the_exponent_of_a_zipf_law_and_its_k(exponent, tau):
    size = 40
    logits = -exponent * torch.arange(1, size + 1, dtype=torch.float64).log().unsqueeze(0)
    epsilon = exponent - 1
    if epsilon == 0:
        scale = 1 / math.log(size)
    else:
        scale = epsilon / (1 - size**-epsilon)
    k = math.floor((scale * 2 ** (2 * tau)) ** (1 / exponent))
    processor = Mirostat1(tau)
    result = processor(ONE, logits, processor.start(ONE))
    assert kept(result) == [list(range(min(max(k, 1), size)))]


def test_mirostat_1_fits_the_possible_tokens_only():
    logits = torch.full((1, 60), -INF, dtype=torch.float64)
    logits[0, 20:] = -1.3 * torch.arange(1, 41, dtype=torch.float64).log()
    k = math.floor((0.3 * 2**4 / (1 - 60**-0.3)) ** (1 / 1.3))
    processor = Mirostat1(2.0)
    assert kept(processor(ONE, logits, processor.start(ONE))) == [list(range(20, 20 + k))]


def test_mirostat_1_survives_rows_without_a_tail_or_a_slope():
    logits = torch.tensor([[0.0, -INF, -INF, -INF], [1.0, 0.0, -INF, -INF], [2.0, 2.0, 2.0, 2.0]])
    context = context_of([[0]] * 3)
    for tau in (0.1, 1.0, 5.0, 2000.0):
        processor = Mirostat1(tau)
        result = processor(context, logits, processor.start(context))
        assert (result > -INF).any(-1).all()
    single = torch.tensor([[1.5]])
    assert Mirostat1(1.0)(ONE, single, Mirostat1(1.0).start(ONE)).tolist() == [[1.5]]


def test_mirostat_2_by_hand():
    # Surprises of 1, 2, 3, 3 bits.
    logits = of_probabilities(0.5, 0.25, 0.125, 0.125)
    processor = Mirostat2(1.25, 0.1)
    state = processor.start(ONE)
    assert state.mu.tolist() == [2.5]
    processed = processor(ONE, logits, state)
    assert kept(processed) == [[0, 1]]
    # Of what is left, token 1 has a third: log2 3 = 1.585 bits; mu falls by a tenth of the distance to 1.25.
    state = processor.accept(state, torch.tensor([1]), logits.softmax(-1), processed.softmax(-1))
    assert state.mu.tolist() == pytest.approx([2.5 - 0.1 * (math.log2(3) - 1.25)])
    assert kept(processor(ONE, logits, state._replace(mu=torch.tensor([3.0 + 1e-9])))) == [[0, 1, 2, 3]]
    assert kept(processor(ONE, logits, state._replace(mu=torch.tensor([-5.0])))) == [[0]], "the likeliest stays"


def test_mirostat_2_is_the_published_recursion_and_its_surprise_comes_to_the_target():
    logits = [-1.1 * math.log(rank) for rank in range(1, 61)]
    weights = [math.exp(z) for z in logits]
    surprises = [-math.log2(weight / sum(weights)) for weight in weights]
    tau, eta, steps = 3.0, 0.1, 400
    (tokens, _), *_ = run(FixedLM(logits), [[0]], steps, processors=[Mirostat2(tau, eta)]).values()
    mu, observed = 2 * tau, []
    for token in tokens:
        allowed = [v for v, surprise in enumerate(surprises) if surprise <= mu] or [0]
        assert token in allowed
        observed.append(-math.log2(weights[token] / sum(weights[v] for v in allowed)))
        mu -= eta * (observed[-1] - tau)
    # The average is off by exactly (first mu - last mu) / (eta * steps), and mu stays within the surprises.
    assert abs(sum(observed) / steps - tau) < (2 * max(surprises)) / (eta * steps)
    later = observed[100:]
    assert abs(sum(later) / len(later) - tau) < 0.25
    free = run(FixedLM(logits), [[0]], steps)[0, 0][0]
    assert sum(surprises[token] for token in free) / steps > tau + 0.5, "without it the text is more surprising"


def test_mirostat_1_brings_the_average_surprise_to_the_target():
    logits = [-1.3 * math.log(rank) for rank in range(1, 61)]
    weights = [math.exp(z) for z in logits]
    tau, eta, steps, size = 2.5, 0.1, 400, 60
    tokens, _ = run(FixedLM(logits, torch.float64), [[0]], steps, processors=[Mirostat1(tau, eta)])[0, 0]
    mu, observed = 2 * tau, []
    for token in tokens:
        k = min(max(math.floor((0.3 * 2**mu / (1 - size**-0.3)) ** (1 / 1.3)), 1), size)
        assert token < k
        observed.append(-math.log2(weights[token] / sum(weights[:k])))
        mu -= eta * (observed[-1] - tau)
    later = observed[100:]
    assert abs(sum(later) / len(later) - tau) < 0.25


def test_adaptive_p_by_hand():
    logits = torch.cat((of_probabilities(0.5, 0.3, 0.2), torch.tensor([[-INF]], dtype=torch.float64)), 1)
    processor = AdaptiveP(0.3, 0.5)
    state = processor.start(ONE)
    # The average starts at the target, which is then the aim: distances of .2, 0, .1 in units of .3.
    result = processor(ONE, logits, state)
    expected = [5 - 10 * (4 / 9) / (5 / 3), 5.0, 5 - 10 * (1 / 9) / (4 / 3), -INF]
    assert result.tolist()[0] == pytest.approx(expected)
    # A token of .5: the sum is .5 + .5 * .6 = .8 and the weight 1 + .5 * 2 = 2, so the average .4 and the aim .2.
    state = processor.accept(state, torch.tensor([0]), logits.softmax(-1), result.softmax(-1))
    assert (state.total.tolist(), state.weight.tolist()) == (pytest.approx([0.8]), pytest.approx([2.0]))
    result = processor(ONE, logits, state)
    assert result.tolist()[0] == pytest.approx([0.0, 5 - 10 * (1 / 9) / (4 / 3), 5.0, -INF], abs=1e-12)


def test_adaptive_ps_aim_stays_a_probability():
    processor = AdaptiveP(0.9)
    state = processor.start(ONE)
    low = state._replace(total=torch.zeros(1, dtype=torch.float64))
    logits = of_probabilities(0.6, 0.4)
    # An average of 0 asks for 1.8, which is no probability: 1 is the aim.
    distances = [0.4 / 0.3, 0.6 / 0.3]
    assert processor(ONE, logits, low).tolist()[0] == pytest.approx([5 - 10 * d * d / (1 + d) for d in distances])


def test_adaptive_p_brings_the_chosen_probability_near_the_target():
    probabilities = [0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02]
    logits = [math.log(p) for p in probabilities]
    for target in (0.1, 0.2, 0.3):
        tokens, _ = run(FixedLM(logits), [[0]], 400, processors=[AdaptiveP(target, 0.9)])[0, 0]
        assert abs(sum(probabilities[token] for token in tokens) / 400 - target) < 0.04


def test_the_first_draws_of_mirostat_have_the_truncated_distribution():
    logits = of_probabilities(0.5, 0.25, 0.125, 0.125).float()[0].tolist()
    events = stream_rows(
        FixedLM(logits), [[0]], max_new_tokens=1, processors=[Mirostat2(1.25)], samples=4000, seeds=[9]
    )
    counts = torch.bincount(torch.tensor([event.token for event in events]), minlength=4)
    assert_distribution(counts, torch.tensor([2 / 3, 1 / 3, 0, 0]))


@pytest.mark.parametrize("make", [Mirostat1, Mirostat2, AdaptiveP])
def test_rows_that_end_at_different_times_give_what_they_give_alone(make):
    model = TableLM(end_bias=0.7, vocab_size=12)
    parameters = [0.4, 0.9, 0.6, 0.2] if make is AdaptiveP else [0.8, 2.5, 1.5, 3.0]
    prompts = [[1], [2, 3, 4, 2, 3], [5, 1], [1, 2, 1, 2]]
    together = run(model, prompts, 40, processors=[Temperature(1.2), make(parameters)], samples=3, end_ids=(0,))
    assert len({len(tokens) for tokens, _ in together.values()}) > 3
    for i, prompt in enumerate(prompts):
        processors = [Temperature(1.2), make(parameters[i])]
        alone = run(model, [prompt], 40, seeds=[100 + i], processors=processors, samples=3, end_ids=(0,))
        assert [alone[0, sample] for sample in range(3)] == [together[i, sample] for sample in range(3)]


@pytest.mark.parametrize("make", [Mirostat1, Mirostat2, AdaptiveP])
def test_a_second_call_starts_anew(make):
    model, processors = TableLM(), [make(0.7)]
    first = run(model, [[1, 2]], 30, processors=processors)
    assert run(model, [[1, 2]], 30, processors=processors) == first


def test_greedy_rows_are_not_shaped():
    pipeline = Pipeline([AdaptiveP(0.1), Mirostat2(0.1), Temperature(0.0)])
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert torch.equal(pipeline(ONE, logits, pipeline.start(ONE)), logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mirostat1(0.0), "Mirostat1's tau is 0.0"),
        (lambda: Mirostat1(m=0), "Mirostat1's m is 0"),
        (lambda: Mirostat2(1.0, -0.1), "Mirostat2's eta is -0.1"),
        (lambda: AdaptiveP(1.2), "AdaptiveP's target is 1.2"),
        (lambda: AdaptiveP(0.5, 1.0), "AdaptiveP's decay is 1.0; expected a number from 0 to 0.99"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
