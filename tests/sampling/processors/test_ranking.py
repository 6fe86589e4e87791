from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minigpt.sampling.draws.choice import is_choosable
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.processors import ranking
from minigpt.sampling.processors.adaptive import Mirostat1, Mirostat2
from minigpt.sampling.processors.borders import Epsilon, Eta, MinP, PLess, TopA, TopNSigma
from minigpt.sampling.processors.processors import Temperature
from minigpt.sampling.processors.ranking import FIRST, count_possible, cut, keep_mass, mean_logit, only_possible, rank
from minigpt.sampling.processors.truncation import ExactTopK, TailFree, TopH, TopK, TopP, Typical
from minigpt.sampling.processors.xtc import XTC
from processor_cases import INF, assert_well_behaved, call, context_of, kept

VOCAB = 3000
ROWS = {
    "peaked": lambda z: 3 * z,
    "wide": lambda z: 0.5 * z,
    "flat": lambda z: 0 * z,
    "full of ties": lambda z: (1.5 * z).round(),
    "ties across the first": lambda z: torch.where(torch.arange(VOCAB) % 11 == 3, (z + 3).clamp(max=2), z - 10),
    "few possible": lambda z: z.masked_fill(torch.arange(VOCAB) % 60 != 7, -INF),
    "as many as the first": lambda z: z.masked_fill(torch.arange(VOCAB) >= FIRST, -INF),
    "one more": lambda z: z.masked_fill(torch.arange(VOCAB) > FIRST, -INF),
    "one possible": lambda z: z.masked_fill(torch.arange(VOCAB) != 1234, -INF),
    "of bfloat16": lambda z: (3 * z - 60).bfloat16().to(z.dtype),
    "deep": lambda z: 200 * z,
    "far off": lambda z: 3 * z + 1e4 * (torch.arange(VOCAB) == 5) - 1e4,
}


def rows_of(dtype: torch.dtype) -> Tensor:
    z = torch.randn(len(ROWS), VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return torch.stack([make(row) for make, row in zip(ROWS.values(), z, strict=True)])


def contexts():
    return context_of([[0]] * len(ROWS))


def first_of(order: Tensor, count: int) -> list[int]:
    return sorted(order[:count].tolist())


def possible(row: Tensor) -> int:
    return int((row > -INF).sum())


def plain_top_p(row: Tensor, p: float, keep: int = 1) -> list[int]:
    falling, order = row.double().sort(descending=True, stable=True)
    mass = falling.softmax(0).cumsum(0)
    count = 1 + int((mass < p).sum())
    return first_of(order, min(max(count, keep), possible(row)))


def plain_typical(row: Tensor, mass: float, keep: int = 1) -> list[int]:
    log_p = row.double().log_softmax(0)
    entropy = torch.special.entr(log_p.exp()).sum()
    rising, order = (-log_p - entropy).abs().sort(stable=True)
    reached = log_p[order].exp().cumsum(0)
    border = rising[min(int((reached < mass).sum()), len(row) - 1)]
    count = max(int((rising <= border + 1e-9).sum()), keep)
    return first_of(order, min(count, possible(row)))


def plain_tail_free(row: Tensor, z: float) -> list[int]:
    falling, order = row.double().sort(descending=True, stable=True)
    bends = falling.softmax(0).diff(n=2).abs()
    beyond = bends.cumsum(0) > z * bends.sum() + 1e-15
    count = 1 + int((~beyond).sum()) if beyond.any() else len(row)
    return first_of(order, min(count, possible(row)))


def plain_top_h(row: Tensor, h: float) -> list[int]:
    falling, order = row.double().sort(descending=True, stable=True)
    terms = torch.special.entr(falling[:100].softmax(0))
    count = int(((terms.cumsum(0) <= h * terms.sum()) & (terms > 0)).sum())
    return first_of(order, max(count, 1))


def plain_top_k(row: Tensor, k: int) -> list[int]:
    return first_of(row.sort(descending=True, stable=True).indices, min(k, possible(row)))


def plain_xtc(row: Tensor, threshold: float) -> list[int]:
    falling, order = row.double().sort(descending=True, stable=True)
    count = int((falling.softmax(0) >= threshold).sum())
    least = int((falling > falling[count - 1]).sum()) if count else 0  # of equals the first stays
    gone = set(order[:count].tolist()) - {int(order[least])}
    return [token for token in range(len(row)) if token not in gone and row[token] > -INF]


CASES = [
    *((TopP(p), plain_top_p, (p,)) for p in (0.0, 0.03337, 0.5003, 0.9003, 0.99903)),
    (TopP(0.20003, keep=300), plain_top_p, (0.20003, 300)),
    (TopP(0.7003, keep=5), plain_top_p, (0.7003, 5)),
    *((Typical(mass), plain_typical, (mass,)) for mass in (0.03337, 0.5003, 0.9003)),
    (Typical(0.3003, keep=5), plain_typical, (0.3003, 5)),
    *((TailFree(z), plain_tail_free, (z,)) for z in (0.0, 0.3, 0.9, 0.999)),
    *((TopH(h), plain_top_h, (h,)) for h in (0.1003, 0.5003, 0.9003)),
    *((ExactTopK(k), plain_top_k, (k,)) for k in (1, 127, 128, 129, 700, 2999)),
    *((XTC(1.0, threshold), plain_xtc, (threshold,)) for threshold in (0.2, 0.01, 3.01e-4)),
]


@pytest.mark.parametrize(("filter_", "plain", "parameters"), CASES, ids=[repr(case[0]) for case in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_is_what_a_full_stable_sort_gives(filter_, plain, parameters, dtype):
    logits = rows_of(dtype)
    result = filter_(contexts(), logits)
    for name, row, ours in zip(ROWS, logits, kept(result), strict=True):
        assert ours == plain(row, *parameters), name
    assert torch.equal(result[result > -INF], logits[result > -INF])


@pytest.mark.parametrize("processor", [case[0] for case in CASES[1::2]] + [Mirostat1(3.0), Mirostat2(6.0)], ids=repr)
def test_rows_that_are_ranked_further_do_not_depend_on_their_neighbours(processor):
    assert_well_behaved(processor, contexts(), rows_of(torch.float32))


@pytest.mark.parametrize("make", [TopP, Typical, TailFree])
def test_a_number_for_each_prompt_may_switch_off_beside_others_that_rank_further(make):
    logits, values = rows_of(torch.float32), [1.0, 0.9, 0.3] * 4
    together = make(values)(contexts(), logits)
    for row, value in enumerate(values):
        assert torch.equal(together[row : row + 1], make(value)(context_of([[0]]), logits[row : row + 1]))


def test_a_flat_row_and_ties_across_the_first_tokens_are_ranked_in_full(monkeypatch):
    widths = []

    def recorded(keys, width):
        falling, places = rank(keys, width)
        widths.append(falling.shape[1])
        return falling, places

    monkeypatch.setattr(ranking, "rank", recorded)
    logits = rows_of(torch.float32)
    names = list(ROWS)
    for name, needed in (("flat", VOCAB), ("ties across the first", 4 * FIRST)):
        row = logits[names.index(name)]
        widths.clear()
        assert kept(ExactTopK(100)(context_of([[0]]), row[None])) == [plain_top_k(row, 100)]
        assert widths[0] == FIRST and widths[-1] == needed
        widths.clear()
        assert kept(TopP(0.03337)(context_of([[0]]), row[None])) == [plain_top_p(row, 0.03337)]
        assert widths[0] == FIRST and widths[-1] == needed
    peaked = logits[names.index("peaked")][None]
    for processor in (TopP(0.1), TailFree(0.5), TopH(0.4), ExactTopK(100)):
        widths.clear()
        processor(context_of([[0]]), peaked)
        assert widths == [FIRST]
    widths.clear()
    ExactTopK(400)(context_of([[0]]), peaked)
    assert widths == [FIRST, 4 * FIRST]


def test_the_first_of_a_ranking_are_in_order_and_of_equals_the_first_come_first():
    keys = torch.tensor([[1.0, 5.0, 3.0, 5.0, 3.0, 5.0, 0.0, -INF, 3.0, 2.0]]).repeat(1, 3)
    falling, places = rank(keys, 15)
    order = keys.sort(descending=True, stable=True)
    assert falling.tolist() == order.values[:, :15].tolist()
    assert places[0, :9].tolist() == order.indices[0, :9].tolist()
    assert set(places[0, 9:].tolist()) < {2, 4, 8, 12, 14, 18, 22, 24, 28}


@pytest.mark.parametrize("mass", [0.001, 0.4003, 0.9003, 1 - 1e-9, 2.0])
def test_adding_up_in_bins_keeps_what_a_plain_sum_keeps(mass):
    def gone(falling, ids, p, mass):
        p = p.gather(1, ids).double()
        return (p.cumsum(-1) - p >= mass) | (falling == -INF)

    logits = rows_of(torch.float64)
    p = logits.softmax(-1)
    wanted = torch.full((len(logits), 1), mass, dtype=torch.float64)
    result = keep_mass(logits, gone, p, wanted, logits)
    for name, row, own, ours in zip(ROWS, logits, p, kept(result), strict=True):
        order = row.sort(descending=True, stable=True).indices
        before = own[order].cumsum(0) - own[order]
        assert ours == first_of(order, min(int((before < mass).sum()), possible(row))), name


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cut_keeps_the_border_itself_and_a_border_of_minus_infinity_everything(rows, dtype):
    logits = torch.tensor([[1.0, -INF, 2.0, 2.0 + 2**-20, 3e38, -3e38, 0.0] * 4], dtype=dtype).repeat(rows, 1)
    for border in (2.0, -INF, 2.0 + 2**-20, -3e38, 3e38, 0.0):
        result = cut(logits, logits, torch.full((rows, 1), border, dtype=dtype))
        assert torch.equal(result, logits.masked_fill(logits < border, -INF))
    other = torch.arange(28, dtype=dtype).expand(rows, -1)
    assert torch.equal(cut(logits, other, other[:, 9:10]), logits.masked_fill(other < 9, -INF))


def test_the_possible_tokens_are_counted_and_keep_their_place():
    logits = rows_of(torch.float32)
    assert count_possible(logits).squeeze(1).tolist() == [possible(row) for row in logits]
    values = torch.full_like(logits, 7.0)
    assert torch.equal(only_possible(values, logits), values.masked_fill(logits == -INF, -INF))


def test_the_mean_logit_gives_the_entropy():
    logits = rows_of(torch.float64)
    p = logits.softmax(-1)
    entropy = -mean_logit(logits, p) - p.amax(-1, keepdim=True).log()
    assert torch.allclose(entropy.squeeze(1), torch.special.entr(p).sum(-1), rtol=1e-9, atol=1e-12)
    assert entropy[list(ROWS).index("flat")].item() == pytest.approx(math.log(VOCAB))


@pytest.mark.parametrize(
    "processor",
    [
        TopK(5),
        ExactTopK(5),
        TopP(0.9),
        TopP(0.999, keep=200),
        MinP(0.1),
        MinP(0.1, keep=3),
        TopA(0.1),
        Epsilon(0.01),
        Eta(0.01, keep=3),
        Typical(0.9),
        TailFree(0.9),
        TopNSigma(1.0),
        TopH(0.5),
        PLess(),
        XTC(1.0, 0.01),
        Mirostat1(),
        Mirostat2(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("vocab", [50, VOCAB])
def test_a_row_that_is_no_distribution_stays_so_and_harms_no_other(processor, vocab):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(4))
    good = call(processor, context_of([[0]]), logits[4:])
    logits[0, 17] = math.nan
    logits[1, 17] = INF
    logits[2] = -INF
    logits[3] = math.nan
    result = call(processor, context_of([[0]] * 5), logits)
    assert is_choosable(result).tolist() == [False] * 4 + [True]
    assert torch.equal(result[4:], good)


def test_one_filter_after_another_sees_only_what_is_left():
    logits = rows_of(torch.float32)
    for last in (TopP(0.6003), Typical(0.6003), TopH(0.5003)):
        together = Pipeline([Temperature(0.9), TopK(50), last])(contexts(), logits)
        for row in range(len(ROWS)):
            left = Pipeline([Temperature(0.9), TopK(50)])(context_of([[0]]), logits[row : row + 1])
            tokens = (left[0] > -INF).nonzero().squeeze(1)
            alone = last(context_of([[0]]), left[:, tokens])
            assert kept(together[row : row + 1]) == [tokens[kept(alone)[0]].tolist()]
