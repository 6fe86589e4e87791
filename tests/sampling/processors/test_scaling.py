from __future__ import annotations

import math

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.sampling.processors.processors import Temperature
from minigpt.sampling.processors.scaling import DynamicTemperature, QuadraticSmoothing
from processor_cases import INF, assert_well_behaved, context_of, of_probabilities, ragged, random_logits

ONE = context_of([[0]])


@pytest.mark.parametrize(
    "processor",
    [
        DynamicTemperature(1.0, 0.5),
        DynamicTemperature(0.5, 0.5, 2.0),
        DynamicTemperature(0.1, 3.0, 0.0),
        QuadraticSmoothing(0.3),
        QuadraticSmoothing(2.0, 2.2),
        QuadraticSmoothing(0.1, 3.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_treats_rows_alone_keeps_its_input_and_the_order_of_the_tokens(processor, dtype):
    logits = random_logits(dtype=dtype)
    assert_well_behaved(processor, ragged(), logits, ragged(padding=None))
    result = processor(ragged(), logits)
    assert torch.equal(result == -INF, logits == -INF)
    assert torch.equal(result.argmax(-1), logits.argmax(-1))
    order = logits.argsort(dim=-1, stable=True)
    assert (result.gather(1, order).diff(dim=-1).nan_to_num(0) >= 0).all()
    assert type(processor).shaping


@pytest.mark.parametrize(
    "processor",
    [DynamicTemperature(1.0, 0.0), DynamicTemperature(1, 0, 3), QuadraticSmoothing(0.0), QuadraticSmoothing(0, 2.5)],
    ids=repr,
)
def test_neutral_parameters_change_nothing(processor):
    logits = random_logits()
    assert torch.equal(processor(ragged(), logits), logits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_dynamic_temperature_without_spread_is_a_temperature(temperature):
    logits = random_logits()[:11]
    possible = (logits > -INF).sum(-1) > 1  # a row with one token is left alone
    fixed, dynamic = Temperature(temperature)(ragged(), logits), DynamicTemperature(temperature, 0)(ragged(), logits)
    assert torch.equal(dynamic[possible], fixed[possible])
    assert torch.equal(dynamic[~possible], logits[~possible])


def test_dynamic_temperature_by_hand():
    # H = 1.75 bits of at most 2; T = .5 + (1.5 - .5) * (1.75 / 2) ** 2
    logits = torch.cat((of_probabilities(0.5, 0.25, 0.125, 0.125), torch.full((1, 2), -INF, dtype=torch.float64)), 1)
    flatness = 1.75 / 2
    expected = logits / (0.5 + flatness**2)
    assert torch.allclose(DynamicTemperature(1.0, 0.5, 2.0)(ONE, logits), expected, rtol=1e-12)


def test_dynamic_temperature_is_lowest_where_certain_and_highest_where_flat():
    flat, certain = torch.full((1, 8), 2.0), torch.tensor([[300.0, 0.0, 0.0, -1.0]])
    assert torch.allclose(DynamicTemperature(1.0, 0.4)(ONE, flat), flat / 1.4)
    assert torch.allclose(DynamicTemperature(1.0, 0.4)(ONE, certain), certain / 0.6)
    # A lowest temperature of 0 leaves the likeliest token alone, without an infinity.
    frozen = DynamicTemperature(1.0, 5.0)(ONE, certain)
    assert frozen.isfinite().all()
    assert frozen.softmax(-1).tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_dynamic_temperature_equals_its_definition_in_plain_numbers(exponent):
    logits = random_logits(dtype=torch.float64)[:3]
    result = DynamicTemperature(0.9, 0.7, exponent)(ragged(), logits)
    for row, ours in zip(logits.tolist(), result.tolist(), strict=True):
        weights = [math.exp(z) for z in row]
        p = [weight / sum(weights) for weight in weights]
        entropy = -sum(q * math.log(q) for q in p if q)
        flatness = entropy / math.log(sum(z > -INF for z in row))
        temperature = 0.2 + 1.4 * flatness**exponent
        assert ours == pytest.approx([z / temperature for z in row], rel=1e-12)


def test_quadratic_smoothing_by_hand():
    logits = torch.tensor([[1.0, 3.0, 0.0, -INF]], dtype=torch.float64)  # d = -2, 0, -3
    assert QuadraticSmoothing(0.5)(ONE, logits).tolist() == [[1.0, 3.0, -1.5, -INF]]
    # curve 2: k = s = 1/2: 3 - .25 d^2 + .25 d^3
    assert QuadraticSmoothing(0.5, 2.0)(ONE, logits).tolist() == [[0.0, 3.0, -6.0, -INF]]
    # curve 3: k = 0, s = 1
    assert QuadraticSmoothing(0.5, 3.0)(ONE, logits).tolist() == [[-1.0, 3.0, -10.5, -INF]]


def test_extreme_logits_stay_numbers():
    logits = torch.tensor([[1e38, -1e38, 0.0, -INF], [1e20, 1e19, -1e20, -INF], [1e-40, 0.0, -1e-40, -INF]])
    context = context_of([[0]] * 3)
    for processor in (QuadraticSmoothing(0.3), QuadraticSmoothing(9.0, 3.0), DynamicTemperature(1.0, 0.5)):
        result = processor(context, logits)
        assert not result.isnan().any()
        assert result[:, 0].isfinite().all() and (result[:, 3] == -INF).all()
        assert result.argmax(-1).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda v: DynamicTemperature(v, 0.5), [0.2, 1.0, 0.5, 3.0]),
        (lambda v: DynamicTemperature(1.0, v), [0.0, 0.3, 1.0, 2.0]),
        (lambda v: DynamicTemperature(1.0, 0.5, v), [0.0, 0.5, 1.0, 2.0]),
        (QuadraticSmoothing, [0.0, 0.2, 1.0, 5.0]),
        (lambda v: QuadraticSmoothing(0.4, v), [1.0, 1.5, 2.0, 3.0]),
    ],
)
def test_a_number_for_each_prompt_does_what_it_does_alone(make, values):
    logits = random_logits()
    prompts = (0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 3, 3)
    rows = context_of([[0]] * 12, prompts=prompts)
    together = make(values)(rows, logits)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], make(values[prompt])(rows, logits)[row])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicTemperature(0.0, 0.5), "DynamicTemperature's temperature is 0.0"),
        (lambda: DynamicTemperature(1.0, [-0.5]), "DynamicTemperature's spread is -0.5"),
        (lambda: DynamicTemperature(1.0, 0.5, "steep"), "DynamicTemperature's exponent is 'steep'"),
        (lambda: QuadraticSmoothing(-1.0), "QuadraticSmoothing's factor is -1.0"),
        (lambda: QuadraticSmoothing(1.0, 3.5), "QuadraticSmoothing's curve is 3.5; expected a number from 1 to 3"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
