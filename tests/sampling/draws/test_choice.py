from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minigpt.sampling.draws.choice import choose, draw, greedy, is_choosable
from minigpt.sampling.draws.noise import uniforms

INF = math.inf


def noise(count: int, seed: int = 0) -> torch.Tensor:
    zero = np.zeros(count, dtype=np.uint64)
    return torch.from_numpy(uniforms(zero + np.uint64(seed), zero, np.arange(count), 0))


def count_draws(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    tokens = torch.cat([draw(logits.expand(len(part), -1), part) for part in numbers.split(10_000)])
    return torch.bincount(tokens, minlength=len(logits))


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum())


def bound(probabilities: torch.Tensor) -> float:
    """Six standard deviations above the mean of the chi-square distribution."""
    freedom = int((probabilities > 0).sum()) - 1
    return freedom + 6 * math.sqrt(2 * freedom)


def test_the_drawn_token_is_where_the_cumulative_distribution_passes_the_number():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().repeat(6, 1)
    numbers = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, numbers).tolist() == [0, 0, 1, 1, 2, 2]


def test_greedy_takes_the_first_of_the_likeliest():
    assert greedy(torch.tensor([[0.0, 2.0, 2.0], [-INF, -INF, -3.0]])).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_token_is_never_drawn_in_a_million(dtype):
    logits = torch.tensor([-INF, 1.0, -INF, -8.0, -INF, 2.0, 0.5, -INF, -INF], dtype=dtype)
    extremes = torch.tensor([0.0, 5e-324, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    counts = count_draws(logits, torch.cat((extremes, noise(1_000_000))))
    assert (counts[logits == -INF] == 0).all()
    assert (counts[logits > -INF] > 0).all()


def test_a_million_draws_have_the_distribution_of_the_logits():
    logits = torch.tensor([0.3, -2.0, 1.5, -INF, 0.0, -6.0])
    counts = count_draws(logits, noise(1_000_000, seed=3))
    exact = logits.double().softmax(0)
    assert chi_square(counts, exact) < bound(exact)


def test_a_token_keeps_a_probability_too_small_for_a_single_precision_sum():
    logits = torch.tensor([[0.0, -20.0]])  # 2e-9, and 1 + 2e-9 is 1 in single precision
    border = 1 / (1 + math.exp(-20))
    assert draw(logits, torch.tensor([border - 1e-12], dtype=torch.float64)).tolist() == [0]
    assert draw(logits, torch.tensor([border + 1e-12], dtype=torch.float64)).tolist() == [1]


def test_each_of_fifty_thousand_tokens_has_its_place():
    logits = torch.zeros(1, 50_000)
    for token in (0, 24_999, 49_999):
        middle = torch.tensor([(token + 0.5) / 50_000], dtype=torch.float64)
        assert draw(logits, middle).tolist() == [token]


def plain_draw(logits: torch.Tensor, number: float) -> int:
    """The inverse of the cumulative distribution, added up one by one in double precision."""
    sums = logits.double().softmax(0).cumsum(0)
    return int((sums <= number * sums[-1]).sum())


@pytest.mark.parametrize("vocab", [2, 255, 256, 257, 511, 513, 5000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_a_draw_is_the_inverse_of_the_plain_cumulative_distribution(vocab, scale):
    logits = scale * torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64)
    numbers = noise(40, seed=vocab)
    numbers[0], numbers[1] = 0.0, 1 - 2**-53
    expected = [plain_draw(row, number) for row, number in zip(logits, numbers.tolist(), strict=True)]
    assert draw(logits, numbers).tolist() == expected
    assert draw(logits.float(), numbers).tolist() == expected, "and rounding moves no border across these numbers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_masked_token_is_never_drawn_from_a_large_vocabulary_whatever_the_number(dtype):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 900, generator=generator).to(dtype)
    logits[torch.rand(logits.shape, generator=generator) < 0.7] = -INF
    logits[1, :300] = -INF  # whole blocks at the beginning, in the middle and at the end
    logits[2, 200:800] = -INF
    logits[3, 500:] = -INF
    extremes = torch.tensor([0.0, 5e-324, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    borders = logits.float().double().softmax(-1).cumsum(-1)[:, ::7].flatten().clamp(max=1 - 2**-53)
    numbers = torch.cat((extremes, borders, noise(4000)))
    for row in logits:
        counts = count_draws(row, numbers)
        assert (counts[row == -INF] == 0).all()
        assert counts[row > -INF].count_nonzero() > 0.9 * (row > -INF).sum()


def test_a_row_of_a_large_vocabulary_draws_in_a_batch_what_it_draws_alone():
    logits = torch.randn(64, 3001, generator=torch.Generator().manual_seed(8))
    logits[::3] = (logits[::3] * 3).round()
    sums = logits.softmax(-1).double().cumsum(-1)
    numbers = (sums[:, 1234] / sums[:, -1]).clamp(max=1 - 2**-53)  # on a border, where a last bit tells
    together = draw(logits, numbers)
    for row in range(64):
        assert draw(logits[row : row + 1], numbers[row : row + 1]) == together[row]
    assert torch.equal(draw(logits.flip(0), numbers.flip(0)), together.flip(0))


def test_only_one_possible_token_is_drawn_by_any_number():
    logits = torch.full((3, 7), -INF)
    logits[:, 4] = -1e30
    assert draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [4, 4, 4]


def test_rows_choose_as_they_would_alone():
    logits = torch.randn(20, 11, generator=torch.Generator().manual_seed(0))
    numbers, greedy_rows = noise(20), [i % 3 == 0 for i in range(20)]
    together = choose(logits, numbers, greedy_rows)
    for i in range(20):
        assert choose(logits[i : i + 1], numbers[i : i + 1], greedy_rows[i : i + 1]) == together[i]


def test_a_row_without_a_finite_maximum_is_told_apart():
    rows = torch.tensor([[1.0, -INF], [-INF, -INF], [math.nan, 1.0], [INF, 0.0], [0.0, 0.0]])
    assert is_choosable(rows).tolist() == [True, False, False, False, True]


def test_choosing_leaves_the_logits_as_they_were():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    choose(logits, noise(4), [True, False, False, True])
    assert torch.equal(logits, before)
