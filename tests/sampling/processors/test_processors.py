from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minigpt.errors import ConfigError
from minigpt.sampling.draws.choice import draw
from minigpt.sampling.draws.noise import Noise, uniforms
from minigpt.sampling.loop.pipeline import Pipeline, gather_state
from minigpt.sampling.processors.processors import AllowedVocabulary, Context, Temperature
from minigpt.sampling.processors.truncation import TopK, TopP

INF = math.inf


def context(rows: int, prompts: tuple[int, ...] | None = None) -> Context:
    lengths = torch.full((rows,), 3)
    return Context(
        ids=torch.zeros(rows, 3, dtype=torch.int64),
        prompt_lengths=lengths,
        lengths=lengths,
        positions=lengths.numpy(),
        rows=tuple(range(rows)) if prompts is None else prompts,
        end_ids=(),
        noise=Noise(range(rows), [0] * rows),
    )


def random_logits(rows: int = 40, vocab_size: int = 50) -> torch.Tensor:
    """Ordinary rows, rows full of ties, rows with -inf, and rows with one possible token."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator)
    logits[1::4] = logits[1::4].round()
    logits[2::4] = logits[2::4].masked_fill(torch.rand(logits[2::4].shape, generator=generator) < 0.6, -INF)
    logits[3, 1:] = -INF
    logits[7] = 0.0
    return logits


@pytest.mark.parametrize("temperature", [1e-4, 0.3, 1, 1.0, 1.7, 50.0])
def test_temperature_equals_transformers(temperature):
    logits = random_logits()
    assert torch.equal(
        Temperature(temperature)(context(40), logits), TemperatureLogitsWarper(float(temperature))(None, logits)
    )


@pytest.mark.parametrize("k", [1, 2, 7, 49, 50, 1000])
def test_top_k_equals_transformers_with_ties_kept(k):
    logits = random_logits()
    assert torch.equal(TopK(k)(context(40), logits), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 0.5, 0.8, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(p):
    logits = random_logits()
    ours, theirs = TopP(p)(context(40), logits), TopPLogitsWarper(p)(None, logits)
    assert torch.equal(ours[0::4], theirs[0::4])
    # Which of several equal tokens go depends on an unstable sort in transformers; how many does not.
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("keep", [1, 3, 12, 1000])
def test_so_many_tokens_survive_at_least_as_in_transformers(keep):
    logits = random_logits()
    for k in (1, 5, 49):
        assert torch.equal(
            TopK(k, keep)(context(40), logits), TopKLogitsWarper(k, min_tokens_to_keep=keep)(None, logits)
        )
    for p in (0.05, 0.5, 0.9):
        ours = TopP(p, keep)(context(40), logits)
        theirs = TopPLogitsWarper(p, min_tokens_to_keep=keep)(None, logits)
        assert torch.equal(ours[0::4], theirs[0::4])
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    assert TopK([1, 5, 50], keep=7)(context(3), logits[:3]).isfinite().sum(-1)[0] == 7


def test_top_p_drops_the_last_of_equally_likely_tokens():
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    assert (TopP(0.5)(context(1), logits) > -INF).tolist() == [[True, False, True, False, False]]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log()

    def kept(p: float) -> list[int]:
        return (TopP(p)(context(1), logits) > -INF).squeeze(0).nonzero().squeeze(1).tolist()

    assert kept(0.0) == [1]
    assert kept(0.4) == [1]
    assert kept(0.6) == [1, 3]
    assert kept(0.8) == [1, 3]
    assert len(kept(0.85)) == 3
    assert kept(1.0) == [0, 1, 2, 3]


def test_top_p_zero_keeps_only_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 4.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert (TopP(0)(context(2), logits) > -INF).nonzero()[:, 1].tolist() == [1, 0]
    flat = 0.01 * torch.randn(50, 5000, generator=torch.Generator().manual_seed(0))
    kept = (TopP(0.0)(context(50), flat) > -INF).nonzero()
    assert kept.tolist() == [[row, token] for row, token in enumerate(flat.argmax(-1).tolist())]


def test_top_p_just_below_one_over_a_large_vocabulary_drops_only_what_exceeds_it():
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    p = 1 - 1e-4
    kept = TopP(p)(context(1), logits) > -INF
    probabilities = logits.double().softmax(-1)
    assert probabilities[kept].sum() >= p - 1e-6
    assert probabilities[kept].sum() - probabilities[kept].min() <= p + 1e-6


def test_neutral_parameters_change_nothing():
    logits = random_logits()
    for processor in (Temperature(1), TopK(50), TopP(1.0), AllowedVocabulary(50)):
        assert torch.equal(processor(context(40), logits), logits)
    assert torch.equal(Pipeline()(context(40), logits), logits)


def test_ids_beyond_the_vocabulary_are_forbidden_and_no_others():
    logits = random_logits()
    allowed = AllowedVocabulary(33)(context(40), logits)
    assert (allowed[:, 33:] == -INF).all()
    assert torch.equal(allowed[:, :33], logits[:, :33])


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (Temperature, [0.4, 1.0, 2.5, 1e-4]),
        (TopK, [1, 3, 50, 200]),
        (TopP, [0.0, 0.3, 0.8, 1.0]),
    ],
)
def test_a_number_for_each_prompt_does_what_it_does_alone(make, values):
    logits = random_logits(12)
    prompts = (0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 3, 3)
    for given in (values, tuple(values), torch.tensor(values, dtype=torch.float64), np.array(values)):
        together = make(given)(context(12, prompts), logits)
        for row, prompt in enumerate(prompts):
            alone = make(values[prompt])(context(1), logits[row : row + 1])
            assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Temperature(-1),
        lambda: Temperature(math.nan),
        lambda: Temperature(math.inf),
        lambda: Temperature("hot"),
        lambda: Temperature([0.5, -0.1]),
        lambda: Temperature([0.5, None]),
        lambda: TopK(0),
        lambda: TopK(2.5),
        lambda: TopK(2, keep=0),
        lambda: TopP(0.5, keep=1.5),
        lambda: TopP(1.5),
        lambda: TopP(True),
    ],
)
def test_a_parameter_out_of_range_is_named(make):
    with pytest.raises(ConfigError, match=r"sampling: (temperature|TopK|TopP)"):
        make()


def test_fewer_numbers_than_prompts_is_an_error():
    with pytest.raises(ConfigError, match="2 numbers"):
        TopP([0.5, 0.6])(context(3), torch.zeros(3, 4))


def forbid_in_place(context, logits):
    logits[:, 2] = -INF
    return logits


class Counted:
    """Bans the token chosen last, and counts the tokens of each row: a state of several parts."""

    class State(NamedTuple):
        last: torch.Tensor
        counts: dict

    def start(self, context):
        return self.State(torch.full_like(context.lengths, -1), {"tokens": np.zeros(len(context.rows), dtype=object)})

    def __call__(self, context, logits, state):
        banned = torch.arange(logits.shape[1]) == state.last[:, None]
        return logits.masked_fill(banned, -INF)

    def accept(self, state, tokens, raw, processed):
        assert torch.allclose(raw.sum(-1), torch.ones(len(raw)))
        assert (processed.gather(1, tokens[:, None]) > 0).all()
        return self.State(tokens, {"tokens": state.counts["tokens"] + 1})


def test_no_processor_changes_its_input_not_even_a_plain_function_that_writes_into_it():
    logits = random_logits()
    before = logits.clone()
    pipeline = Pipeline(
        [Temperature(0.7), forbid_in_place, TopK(5), TopP(0.5), AllowedVocabulary(3), TopP(0), Counted()]
    )
    here = context(40)
    processed = pipeline(here, logits, pipeline.start(here))
    assert torch.equal(logits, before)
    assert (processed[:, 2] == -INF).all()


def test_functions_of_two_and_of_three_arguments_are_told_apart():
    class Method:
        def halve(self, context, logits):
            return logits / 2

    def scaled(factor, context, logits):
        return logits * factor

    def with_state(context, logits, state=None):
        assert state is None
        return logits

    pipeline = Pipeline([Method().halve, partial(scaled, 4.0), lambda context, logits: logits + 1, with_state])
    assert pipeline(context(1), torch.tensor([[1.0]])).item() == 3.0


def forget(context, logits):
    logits[:, 0] = 0


def test_what_is_no_processor_is_refused():
    with pytest.raises(ConfigError, match="is not a processor"):
        Pipeline([lambda logits: logits])
    with pytest.raises(ConfigError, match="forget returned None"):
        Pipeline([forget])(context(1), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match=r"shape \(1,\)"):
        Pipeline([lambda context, logits: logits[:, 0]])(context(1), torch.zeros(1, 2))


def test_greedy_rows_are_banned_but_not_shaped():
    pipeline = Pipeline([TopK([1, 1, 2]), forbid_in_place, Temperature([0.0, 2.0, 0.5])])
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    here = context(3)
    assert pipeline.greedy(here) == [True, False, False]
    expected = [[1.0, 2.0, -INF, 4.0], [-INF, -INF, -INF, 2.0], [-INF, -INF, -INF, 8.0]]
    assert pipeline(here, logits).tolist() == expected
    assert pipeline(context(1), logits[:1]).tolist() == expected[:1]


def test_a_greedy_row_stays_finite_on_its_own():
    assert Temperature(0)(context(1), torch.tensor([[1.0, -INF]])).tolist() == [[1.0, -INF]]


def test_states_are_gathered_whatever_tree_they_form():
    here = context(3)
    counted = Counted()
    state = counted.start(here)._replace(last=torch.tensor([4, 5, 6]))
    state.counts["tokens"][:] = ["x", "y", "z"]
    gathered = gather_state((state, None), [2, 0])
    assert isinstance(gathered[0], Counted.State)
    assert gathered[0].last.tolist() == [6, 4]
    assert gathered[0].counts["tokens"].tolist() == ["z", "x"]
    assert gathered[1] is None
    with pytest.raises(TypeError, match="list"):
        gather_state([torch.zeros(3)], [0])


def test_the_processor_that_leaves_nothing_is_named():
    def forbid_all(context, logits):
        return torch.full_like(logits, -INF)

    here, logits = context(2), torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    pipeline = Pipeline([TopK(1), forbid_all, TopP(0.5)])
    assert "forbid_all" in pipeline.blame(here, logits, None, 0)
    assert "model" in pipeline.blame(here, logits, None, 1)
    both = Pipeline([AllowedVocabulary(1), forbid_first])
    assert "forbid_first" in both.blame(here, logits, None, 0)


def forbid_first(context, logits):
    logits[:, 0] = -INF
    return logits


@pytest.mark.parametrize(
    ("processors", "exact"),
    [
        ([Temperature(0.5)], lambda p: p**2 / (p**2).sum()),
        ([Temperature(2.0)], lambda p: p**0.5 / (p**0.5).sum()),
        ([TopK(2)], lambda p: torch.tensor([0.4, 0.0, 0.3, 0.0, 0.0]) / 0.7),
        ([TopP(0.8)], lambda p: torch.tensor([0.4, 0.0, 0.3, 0.2, 0.0]) / 0.9),
        ([TopK(3), TopP(0.7)], lambda p: torch.tensor([0.4, 0.0, 0.3, 0.0, 0.0]) / 0.7),
        ([AllowedVocabulary(2)], lambda p: torch.tensor([0.4, 0.06, 0.0, 0.0, 0.0]) / 0.46),
    ],
)
def test_draws_have_the_exact_distribution(processors, exact):
    probabilities = torch.tensor([0.4, 0.06, 0.3, 0.2, 0.04], dtype=torch.float64)
    count = 200_000
    zero = np.zeros(count, dtype=np.uint64)
    logits = Pipeline(processors)(context(1), probabilities.log().float().unsqueeze(0))
    tokens = draw(logits.expand(count, -1), torch.from_numpy(uniforms(zero, zero, np.arange(count), 0)))
    counts = torch.bincount(tokens, minlength=5)
    expected = exact(probabilities).double() * count
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    freedom = int(possible.sum()) - 1
    statistic = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)
