from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from beams import every_text, search
from minigpt.errors import ConfigError
from minigpt.sampling.draws.noise import Noise
from minigpt.sampling.processors.processors import Temperature
from minigpt.sampling.processors.truncation import TopK
from minigpt.sampling.search.expansion import Step, drawn_top_down
from minigpt.sampling.search.hypotheses import Beam
from table_model import FixedLM, TableLM

INF = math.inf

# Groups.


def groups_by_hand(model, prompt, length, width, groups, penalty) -> list[tuple[list[int], float]]:
    """Each group a beam search; in a step later groups pay for the tokens that earlier ones took. No end tokens."""
    beams = [[([], 0.0)] for _ in range(groups)]
    for _ in range(length):
        taken: list[int] = []
        for number in range(groups):
            following = [
                ([*text, token], total + math.log(p) - penalty * taken.count(token))
                for text, total in beams[number]
                for token, p in enumerate(model.probabilities([*prompt, *text]))
            ]
            beams[number] = sorted(following, key=lambda pair: -pair[1])[:width]
            taken += [text[-1] for text, _ in beams[number]]
    return sorted((pair for group in beams for pair in group), key=lambda pair: -pair[1])


@pytest.mark.parametrize(("width", "groups", "penalty"), [(1, 3, 0.5), (2, 2, 1.5), (2, 3, 10.0), (3, 2, 0.0)])
def test_later_groups_pay_for_the_tokens_of_earlier_ones(width, groups, penalty):
    model = TableLM(order=None, dtype=torch.float64)
    options = {"num_beams": width * groups, "num_beam_groups": groups, "diversity_penalty": penalty}
    prompts = [[1, 2], [3]]
    for prompt, found in zip(prompts, search(model, prompts, 5, length_penalty=0.0, **options), strict=True):
        expected = groups_by_hand(model, prompt, 5, width, groups, penalty)
        assert [best.score for best in found] == pytest.approx([total for _, total in expected])
        assert sorted(best.tokens for best in found) == sorted(text for text, _ in expected)


def test_groups_that_cannot_avoid_each_other_at_no_price_are_as_many_equal_searches():
    model = TableLM(order=None, end_bias=1.0, dtype=torch.float64)
    (plain,) = search(model, [[1, 2]], 6, end_ids=[0], num_beams=2)
    (grouped,) = search(model, [[1, 2]], 6, end_ids=[0], num_beams=6, num_beam_groups=3)
    assert [best.tokens for best in grouped] == [best.tokens for best in plain for _ in range(3)]
    firsts = search(model, [[1, 2]], 1, num_beams=6, num_beam_groups=6, diversity_penalty=100.0)[0]
    assert sorted(best.tokens[0] for best in firsts) == [0, 1, 2, 3, 4, 5]


# Drawing.


def assert_drawn(drawn: list, probabilities: dict) -> None:
    """Chi-square over the outcomes, the rare ones as one; the bound is 6 standard deviations above the mean."""
    assert math.isclose(sum(probabilities.values()), 1)
    assert set(drawn) <= set(probabilities)
    frequent = [outcome for outcome, p in probabilities.items() if p * len(drawn) >= 5]
    observed = [drawn.count(outcome) for outcome in frequent]
    expected = [len(drawn) * probabilities[outcome] for outcome in frequent]
    observed.append(len(drawn) - sum(observed))
    expected.append(max(len(drawn) - sum(expected), 1e-9))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert statistic < len(frequent) + 6 * math.sqrt(2 * len(frequent))


def test_one_stochastic_beam_draws_from_the_model():
    model = TableLM(vocab_size=3, order=None, scale=1.0, dtype=torch.float64)
    count = 1200
    texts = every_text(model, [1], 3, end_ids=(0,))
    found = search(model, [[1]] * count, 3, end_ids=[0], seeds=range(count), num_beams=1, method="stochastic")
    drawn = [tuple(best.tokens) for (best,) in found]
    assert_drawn(drawn, {text: math.exp(total) for text, total in texts.items()})


def test_stochastic_beams_are_texts_drawn_without_replacement():
    """The pair in its order has probability p(a) p(b) / (1 - p(a)): drawing a, then b among the others."""
    model = TableLM(vocab_size=3, order=None, scale=1.0, dtype=torch.float64)
    count = 1500
    p = {text: math.exp(total) for text, total in every_text(model, [1], 2, end_ids=(0,)).items()}
    found = search(model, [[1]] * count, 2, end_ids=[0], seeds=range(count), num_beams=2, method="stochastic")
    drawn = [tuple(tuple(best.tokens) for best in own) for own in found]
    assert_drawn(drawn, {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(p, 2)})
    for own in found:
        assert [best.log_prob for best in own] == pytest.approx([math.log(p[tuple(best.tokens)]) for best in own])
        assert own[0].score >= own[1].score
    # The greatest of all perturbed log-probabilities is a standard Gumbel number: mean 0.5772, variance pi^2/6.
    greatest = np.array([own[0].score for own in found])
    assert abs(greatest.mean() - 0.5772) < 5 * math.pi / math.sqrt(6 * count)


def test_perturbed_log_probabilities_of_continuations_follow_the_formula_of_the_paper():
    keys = [2.0, -1.0, 0.3]
    group = SimpleNamespace(beams=[Beam(key=key) for key in keys])
    totals = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -INF, -1.0], [-0.1, -9.0, -4.0]], dtype=torch.float64)
    step = Step([group], totals, totals, np.array([4, 4, 4]), Noise([5, 5, 5], [0, 0, 0]))
    unconditional = (totals + step.gumbels()).tolist()
    for key, found, before in zip(keys, drawn_top_down(step).tolist(), unconditional, strict=True):
        for one, g in zip(found, before, strict=True):
            inside = math.exp(-key) - math.exp(-max(before)) + math.exp(-g)
            assert one == pytest.approx(-math.log(inside) if g > -INF else -INF)
        assert max(found) == pytest.approx(key)


def test_as_many_stochastic_beams_as_texts_find_every_text_once():
    model = TableLM(vocab_size=3, order=None, dtype=torch.float64)
    texts = every_text(model, [1], 3, end_ids=(0,))
    (found,) = search(model, [[1]], 3, end_ids=[0], num_beams=40, method="stochastic")
    assert sorted(tuple(best.tokens) for best in found) == sorted(texts)


def test_stochastic_search_normalises_what_processors_leave():
    model = FixedLM([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    count = 1200
    options = {"num_beams": 1, "method": "stochastic", "seeds": range(count)}
    found = search(model, [[1]] * count, 1, [Temperature(2.0), TopK(2)], **options)
    p = 1 / (1 + math.exp(-0.5))
    threes = sum(best.tokens == [3] for (best,) in found)
    assert abs(threes - count * p) < 5 * math.sqrt(count * p * (1 - p))
    assert {round(best.log_prob, 9) for (best,) in found} == {round(math.log(p), 9), round(math.log(1 - p), 9)}


def test_drawn_beams_are_drawn_without_replacement_from_all_continuations():
    """One step: of 2 K = 4 draws, the best two stay. Oracle: every ordered draw of four, with its probability."""
    logits = [0.0, 0.5, 1.0, 1.5, 2.0]
    weights = [math.exp(logit) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    expected: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(5), 4):
        rest, chance = 1.0, 1.0
        for token in order:
            chance *= p[token] / rest
            rest -= p[token]
        # At its last token per text ends, if it is among the best two of those drawn.
        pair = tuple(sorted(order, reverse=True)[:2])
        expected[pair] = expected.get(pair, 0.0) + chance
    count = 1200
    options = {"num_beams": 2, "method": "sample", "seeds": range(count)}
    found = search(FixedLM(logits, dtype=torch.float64), [[1]] * count, 1, **options)
    assert_drawn([tuple(best.tokens[0] for best in own) for own in found], expected)


def test_the_best_of_the_drawn_may_end_not_the_first_drawn():
    """One beam, two draws a step: the end (0) is drawn first, but token 1 is likelier, and the text goes on."""
    options = {"num_beams": 1, "method": "sample", "end_ids": [0]}
    model = FixedLM([0.0, 1.0, 2.0], dtype=torch.float64)
    (found,) = search(model, [[2]], 3, draw=lambda totals, count: torch.tensor([0, 1]), **options)
    assert [(best.tokens, best.finish_reason) for best in found] == [([1, 1, 1], "length")]
    model = FixedLM([1.0, 0.0, 2.0], dtype=torch.float64)
    (found,) = search(model, [[2]], 3, draw=lambda totals, count: torch.tensor([1, 0]), early_stopping=True, **options)
    assert [(best.tokens, best.finish_reason) for best in found] == [([0], "end")]


def test_temperature_zero_leaves_nothing_to_draw():
    for method in ("sample", "stochastic"):
        with pytest.raises(ConfigError, match=f"{method!r} samples, but a temperature is 0"):
            search(TableLM(), [[1]], processors=[Temperature(0)], num_beams=2, method=method)
