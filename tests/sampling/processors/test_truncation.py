from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from minigpt.errors import ConfigError
from minigpt.sampling.draws.choice import draw
from minigpt.sampling.draws.noise import uniforms
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.processors.borders import Epsilon, Eta, MinP, PLess, TopA, TopNSigma
from minigpt.sampling.processors.processors import Filter, Temperature
from minigpt.sampling.processors.truncation import ExactTopK, TailFree, TopH, TopK, TopP, Typical
from minigpt.sampling.processors.xtc import XTC
from minigpt.sampling.settings.shape import FILTERS
from processor_cases import (
    INF,
    assert_distribution,
    assert_well_behaved,
    call,
    context_of,
    filter_class,
    filter_values,
    filters_made,
    kept,
    of_probabilities,
    ragged,
    random_logits,
)
from toys import needs_transformers

ONE = context_of([[0]])

EXAMPLES = [
    ExactTopK(3),
    MinP(0.1),
    MinP(0.9, keep=4),
    TopA(0.7),
    TopA(1.0, keep=3),
    Epsilon(0.05),
    Epsilon(0.9, keep=3),
    Eta(0.05),
    Eta(0.9, keep=3),
    Typical(0.3),
    Typical(0.9, keep=5),
    TailFree(0.4),
    TailFree(0.0),
    TailFree(0.9, keep=4),
    TopNSigma(0.8),
    TopH(0.33),
    TopH(1.0, top_n=7),
    PLess(),
    XTC(1.0, 0.05),
    XTC(0.5, 0.0),
    XTC(1.0, 0.02, spare=(3, 4), keep=3),
]

TRIED = {*map(type, EXAMPLES), TopK, TopP}
EXAMPLES += [made for name in FILTERS if filter_class(name) not in TRIED for made in filters_made(name)]


@pytest.mark.parametrize("processor", EXAMPLES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_filter_treats_rows_alone_keeps_its_input_and_leaves_a_token(processor, dtype):
    logits = random_logits(dtype=dtype)
    assert_well_behaved(processor, ragged(), logits, ragged(padding=None))
    result = call(processor, ragged(), logits)
    assert (result > -INF).any(-1).all()
    assert ((result == logits) | (result == -INF)).all()
    assert type(processor).shaping


@pytest.mark.parametrize(
    "processor",
    [
        ExactTopK(50),
        ExactTopK(10**30),
        MinP(0),
        TopA(0.0),
        Epsilon(0.0),
        Eta(0.0),
        Typical(1.0),
        TailFree(1),
        TopNSigma(0.0),
        XTC(0.0, 0.1),
        XTC(1.0, 0.51),
    ],
    ids=repr,
)
def test_neutral_parameters_change_nothing(processor):
    logits = random_logits()
    assert torch.equal(call(processor, ragged(), logits), logits)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("keep", [1, 4, 1000])
def test_min_p_equals_transformers(min_p, keep):
    logits = random_logits()[: 12 if keep == 1 else 11]  # `keep` takes logits in order, also where p underflows to 0
    ours, oracle = MinP(min_p, keep)(ragged(), logits), theirs.MinPLogitsWarper(min_p, min_tokens_to_keep=keep)
    assert torch.equal(ours[0::4], oracle(None, logits)[0::4])
    # Which of several equal tokens `keep` saves is not defined there; how many is.
    assert torch.equal(ours.sort(-1).values, oracle(None, logits).sort(-1).values)


@pytest.mark.parametrize("epsilon", [3e-4, 0.02, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("keep", [1, 4, 1000])
@pytest.mark.parametrize(
    ("ours", "oracle"), [(Epsilon, theirs.EpsilonLogitsWarper), (Eta, theirs.EtaLogitsWarper)], ids=["epsilon", "eta"]
)
def test_epsilon_and_eta_equal_transformers(ours, oracle, epsilon, keep):
    logits = random_logits()
    expected = oracle(epsilon, min_tokens_to_keep=keep)(None, logits)
    assert torch.equal(ours(epsilon, keep)(ragged(), logits), expected)


@pytest.mark.parametrize("mass", [0.01, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("keep", [1, 4, 1000])
def test_typical_equals_transformers(mass, keep):
    logits = random_logits()
    ours = Typical(mass, keep)(ragged(), logits)
    expected = theirs.TypicalLogitsWarper(mass, min_tokens_to_keep=keep)(None, logits)
    assert torch.equal(ours[0::4], expected[0::4])
    if keep == 1:  # with more, which of several equal tokens are saved is not defined there
        assert torch.equal(ours, expected)


@needs_transformers(">=5", "before, it has no top-h")
@pytest.mark.parametrize("h", [0.043, 0.333, 0.515, 0.91, 0.991])
@pytest.mark.parametrize("vocab", [50, 130])
def test_top_h_equals_transformers(h, vocab):
    logits = random_logits(vocab=vocab)
    ours, expected = TopH(h)(ragged(), logits), theirs.TopHLogitsWarper(h)(None, logits)
    assert torch.equal(ours[0::4], expected[0::4])
    assert torch.equal(ours.sort(-1).values, expected.sort(-1).values)


def test_exactly_k_are_kept_and_of_equals_the_first():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-INF, 1.0, -INF, -INF, -INF]])
    assert kept(ExactTopK(3)(context_of([[0]] * 3), logits)) == [[0, 1, 4], [0, 1, 2], [1]]


@pytest.mark.parametrize("k", [1, 2, 7, 49])
def test_exactly_k_equals_a_plain_sort(k):
    logits = random_logits()
    result = ExactTopK(k)(ragged(), logits)
    for row, ours in zip(logits.tolist(), result.tolist(), strict=True):
        first = sorted(range(50), key=lambda token: -row[token])[:k]
        assert ours == [value if token in first else -INF for token, value in enumerate(row)]


def test_top_a_removes_what_is_below_a_share_of_the_squared_peak():
    # .5 ** 2 * .4 = .1
    logits = of_probabilities(0.5, 0.2, 0.12, 0.09, 0.05, 0.04)
    assert kept(TopA(0.4)(ONE, logits)) == [[0, 1, 2]]
    assert kept(TopA(0.4, keep=4)(ONE, logits)) == [[0, 1, 2, 3]]
    assert kept(TopA(1.0)(ONE, of_probabilities(0.25, 0.25, 0.25, 0.25))) == [[0, 1, 2, 3]]


def test_p_less_keeps_what_is_likelier_than_an_agreement():
    assert kept(PLess()(ONE, of_probabilities(0.1, 0.15, 0.2, 0.25, 0.3))) == [[3, 4]]
    assert kept(PLess()(ONE, of_probabilities(*[0.2] * 5))) == [[0, 1, 2, 3, 4]]
    for count in range(1, 200):  # where all are equal, the sum of squares is their probability, but for rounding
        assert kept(PLess()(ONE, torch.full((1, count), 0.37))) == [list(range(count))]


def test_top_n_sigma_keeps_what_is_within_the_populations_deviations():
    logits = of_probabilities(0.1, 0.2, 0.3, 0.4)
    assert kept(TopNSigma(1.0)(ONE, logits)) == [[2, 3]]
    assert kept(TopNSigma(0.0)(ONE, logits)) == [[0, 1, 2, 3]]
    assert kept(TopNSigma(3.0)(ONE, logits)) == [[0, 1, 2, 3]]
    # 0, 1, 2, 3: sigma = sqrt(1.25) = 1.118 (the unbiased one would be 1.291)
    plain = torch.tensor([[0.0, 1.0, -INF, 2.0, 3.0]])
    assert kept(TopNSigma(1.75)(ONE, plain)) == [[3, 4]]
    assert kept(TopNSigma(1.80)(ONE, plain)) == [[1, 3, 4]]


@pytest.mark.parametrize("temperature", [0.1, 0.6, 1.7, 30.0])
def test_top_n_sigma_does_not_depend_on_the_temperature(temperature):
    logits = random_logits()
    heated = Temperature(temperature)(ragged(), logits)
    for n in (0.3, 0.77, 1.4):
        assert kept(TopNSigma(n)(ragged(), heated)) == kept(TopNSigma(n)(ragged(), logits))


def plain_tail_free(row: list[float], z: float) -> list[int]:
    order = sorted(range(len(row)), key=lambda token: -row[token])
    weights = [math.exp(row[token] - max(row)) for token in order]
    p = [weight / sum(weights) for weight in weights]
    bends = [abs((p[i + 2] - p[i + 1]) - (p[i + 1] - p[i])) for i in range(len(p) - 2)]
    keep, spent = [order[0]], 0.0
    for place in range(1, len(p)):
        if place - 1 < len(bends):
            spent += bends[place - 1]
        if sum(bends) > 0 and spent > z * sum(bends):
            break
        keep.append(order[place])
    return sorted(keep)


@pytest.mark.parametrize("z", [0.0, 0.15, 0.5, 0.83, 0.97])
def test_tail_free_equals_its_definition_in_plain_numbers(z):
    logits = random_logits(dtype=torch.float64)
    rows = [0, 1, 4, 5, 7, 8, 9]
    assert [kept(TailFree(z)(ragged(), logits))[i] for i in rows] == [
        plain_tail_free(logits[i].tolist(), z) for i in rows
    ]


def test_tail_free_by_hand():
    # In order .5, .2, .1, .06, .05: falls of .3, .1, .04, .01, bends of .2, .06, .03, which are shares of .69, .90, 1.
    logits = of_probabilities(0.05, 0.5, 0.2, 0.1, 0.06)
    assert kept(TailFree(0.6)(ONE, logits)) == [[1]]
    assert kept(TailFree(0.8)(ONE, logits)) == [[1, 2]]
    assert kept(TailFree(0.95)(ONE, logits)) == [[1, 2, 3]]
    assert kept(TailFree(0.5)(ONE, torch.zeros(1, 4))) == [[0, 1, 2, 3]]
    assert kept(TailFree(0.5)(ONE, torch.tensor([[0.0, 1.0]]))) == [[0, 1]]
    assert kept(TailFree(0.5)(ONE, torch.tensor([[2.0]]))) == [[0]]


@pytest.mark.parametrize(
    ("threshold", "left"),
    [(0.09, [3]), (0.19, [2, 3]), (0.2, [2, 3]), (0.29, [1, 2, 3]), (0.39, [0, 1, 2, 3]), (0.4, [0, 1, 2, 3])],
)
def test_xtc_removes_all_top_choices_but_the_last(threshold, left):
    assert kept(XTC(1.0, threshold)(ONE, of_probabilities(0.4, 0.3, 0.2, 0.1))) == [left]


def test_xtc_counts_a_token_at_the_threshold_and_keeps_one_of_equals():
    assert kept(XTC(1.0, 0.5)(ONE, torch.zeros(1, 2))) == [[0]]
    assert kept(XTC(1.0, 0.25)(ONE, torch.zeros(1, 4))) == [[0]]


def test_xtc_takes_no_impossible_token_for_a_choice():
    assert kept(XTC(1.0, 0.0)(ONE, of_probabilities(0.4, 0.3, 0.3, 0.0))) == [[1]]


def test_xtc_leaves_a_row_whose_spared_token_would_go_and_only_that_one():
    logits = of_probabilities(0.4, 0.3, 0.2, 0.1).repeat(2, 1)
    logits[1] = logits[1].flip(0)
    two = context_of([[0]] * 2)
    assert kept(XTC(1.0, 0.2, spare=(0,))(two, logits)) == [[0, 1, 2, 3], [0, 1]]
    assert kept(XTC(1.0, 0.2, spare=(2,))(two, logits)) == [[2, 3], [0, 1, 2, 3]]
    assert kept(XTC(1.0, 0.2, keep=2)(two, logits)) == [[2, 3], [0, 1]]
    assert kept(XTC(1.0, 0.2, keep=3)(two, logits)) == [[0, 1, 2, 3]] * 2


def test_xtcs_coin_falls_as_often_as_asked_and_apart_from_the_choice():
    count, probabilities = 20_000, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rows = context_of([[0]] * count, seeds=np.arange(count))
    logits = XTC(0.3, 0.2)(rows, probabilities.log().expand(count, -1))
    tokens = draw(logits, rows.uniform(0))
    fallen = torch.tensor([0.0, 0.0, 0.2, 0.1]) / 0.3
    assert_distribution(torch.bincount(tokens, minlength=4), 0.7 * probabilities + 0.3 * fallen)
    assert_distribution(torch.bincount((logits[:, 0] == -INF).long()), torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize(
    ("processor", "exact"),
    [
        (ExactTopK(2), [0.4, 0, 0.3, 0, 0]),
        (MinP(0.4), [0.4, 0, 0.3, 0.2, 0]),
        (TopA(0.5), [0.4, 0, 0.3, 0.2, 0]),
        (Epsilon(0.05), [0.4, 0.06, 0.3, 0.2, 0]),
        (PLess(), [0.4, 0, 0.3, 0, 0]),
    ],
    ids=repr,
)
def test_draws_have_the_truncated_distribution(processor, exact):
    probabilities = torch.tensor([0.4, 0.06, 0.3, 0.2, 0.04], dtype=torch.float64)
    logits = Pipeline([processor])(ONE, probabilities.log().float().unsqueeze(0))
    zero = np.zeros(100_000, dtype=np.uint64)
    numbers = torch.from_numpy(uniforms(zero, zero, np.arange(100_000), 0))
    tokens = draw(logits.expand(100_000, -1), numbers)
    assert_distribution(torch.bincount(tokens, minlength=5), torch.tensor(exact) / sum(exact))


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (ExactTopK, [1, 3, 50, 200]),
        (MinP, [0.0, 0.02, 0.3, 1.0]),
        (TopA, [0.0, 0.2, 0.7, 1.0]),
        (Epsilon, [0.0, 0.02, 0.1, 0.6]),
        (Eta, [0.0, 0.02, 0.1, 0.6]),
        (Typical, [0.1, 0.5, 0.9, 1.0]),
        (TailFree, [0.0, 0.3, 0.8, 1.0]),
        (TopNSigma, [0.0, 0.5, 1.0, 2.5]),
        (TopH, [0.1, 0.33, 0.77, 1.0]),
        (lambda value: XTC(value, 0.03), [0.0, 0.4, 0.6, 1.0]),
        (lambda value: XTC(1.0, value), [0.0, 0.03, 0.2, 1.0]),
    ],
)
def test_a_number_for_each_prompt_does_what_it_does_alone(make, values):
    logits = random_logits()
    prompts = (0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 3, 3)
    rows = context_of([[0]] * 12, prompts=prompts)
    for given in (values, torch.tensor(values, dtype=torch.float64), np.array(values)):
        together = make(given)(rows, logits)
        for row, prompt in enumerate(prompts):
            assert torch.equal(together[row], make(values[prompt])(rows, logits)[row])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinP(1.1), "MinP's min_p is 1.1"),
        (lambda: MinP([0.1, None]), "MinP's min_p is None"),
        (lambda: MinP(0.1, keep=0), "MinP's keep is 0"),
        (lambda: TopA(-0.1), "TopA's a is -0.1"),
        (lambda: Epsilon(1.0), "Epsilon's epsilon is 1.0"),
        (lambda: Eta(math.nan), "Eta's epsilon is nan"),
        (lambda: Typical(0.0), "Typical's mass is 0.0"),
        (lambda: TailFree("much"), "TailFree's z is 'much'"),
        (lambda: TopNSigma(-1), "TopNSigma's n is -1"),
        (lambda: TopH(0.0), "TopH's h is 0.0"),
        (lambda: ExactTopK(0), "ExactTopK's k is 0"),
        (lambda: XTC(2, 0.1), "XTC's probability is 2"),
        (lambda: XTC(1, 0.1, spare=(-1,)), "XTC's spare"),
        (lambda: XTC(1, 0.1, spare=(9,))(ONE, torch.zeros(1, 4)), "XTC names token 9"),
        (lambda: TopNSigma([0.5])(context_of([[0]] * 2), torch.zeros(2, 4)), "1 numbers"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_top_h_of_one_keeps_everything_beside_a_row_that_has_it():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    both = TopH((0.3, 1.0))(context_of([[1], [1]]), logits)
    assert torch.equal(both[1], logits[1])
    assert torch.equal(both[:1], TopH(0.3)(context_of([[1]]), logits[:1]))
    assert (both[0] > -INF).sum() < 100


def test_exactly_k_leaves_as_many_as_it_is_told_to_keep():
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    for k in (1, (1, 5)):
        kept = (ExactTopK(k, keep=3)(context_of([[1], [1]]), logits) > -INF).sum(-1).tolist()
        assert kept == ([3, 3] if k == 1 else [3, 5])


STRICT: dict[type, tuple] = {  # each as strict as it can be: alone it leaves very little
    **{TopK: (1,), ExactTopK: (1,), TopP: (0.0,), MinP: (1.0,), TopA: (1.0,), Epsilon: (0.999,), Eta: (0.999,)},
    **{Typical: (1e-3,), TailFree: (0.0,), TopNSigma: (1e-6,), TopH: (1e-3,), PLess: (), XTC: (1.0, 0.01)},
}
STRICT = {filter_class(name): tuple(filter_values(name)[-1:]) for name in FILTERS} | STRICT


@pytest.mark.parametrize("kind", Filter.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_filter_leaves_as_many_as_it_is_told_to_keep(kind):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(3)) * torch.tensor([[1.0], [5.0], [20.0]])
    logits[:, 250:] = -INF
    context = context_of([[1], [1], [1]])
    alone = call(kind(*STRICT[kind]), context, logits)
    for keep in (2, 3, 200, 1000):
        left = call(kind(*STRICT[kind], keep=keep), context, logits)
        assert ((left > -INF).sum(-1) >= min(keep, 250)).all()
        if kind not in (XTC, Typical):  # one removes the top, the other ranks by surprise
            border = logits.sort(-1, descending=True).values[:, min(keep, 250) - 1 : min(keep, 250)]
            assert torch.equal(left, torch.where((logits >= border) | (alone > -INF), logits, -INF))
    with pytest.raises(ConfigError, match=f"{kind.__name__}'s keep is 0"):
        kind(*STRICT[kind], keep=0)
