"""What the tests of processors share: ragged contexts, awkward logits, and the facts that hold for every processor."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt.sampling.draws.noise import Noise
from minigpt.sampling.loop.pipeline import gather_state
from minigpt.sampling.processors.processors import Context
from minigpt.sampling.recipe import MAKERS, Settings
from minigpt.sampling.settings.config import FIELDS, SamplingConfig
from minigpt.sampling.settings.shape import FILTERS

INF = math.inf
VOCAB = 50


def context_of(
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None = None,
    prompts: Sequence[int] | None = None,
    end_ids: tuple[int, ...] = (),
    padding: int | None = 0,
    seeds: Sequence[int] | None = None,
) -> Context:
    """Rows of these tokens; padding None fills up with random ids."""
    lengths = torch.tensor([len(text) for text in texts])
    generator = torch.Generator().manual_seed(11)
    shape = (len(texts), int(lengths.max()))
    ids = torch.randint(VOCAB, shape, generator=generator) if padding is None else torch.full(shape, padding)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return Context(
        ids=ids,
        prompt_lengths=lengths if prompt_lengths is None else torch.tensor(prompt_lengths),
        lengths=lengths,
        positions=lengths.numpy(),
        rows=tuple(range(len(texts)) if prompts is None else prompts),
        end_ids=end_ids,
        noise=Noise(range(len(texts)) if seeds is None else seeds, [0] * len(texts)),
    )


def row_of(context: Context, row: int) -> Context:
    """One row alone, without padding."""
    length = int(context.lengths[row])
    return dataclasses.replace(
        context,
        ids=context.ids[row : row + 1, :length],
        prompt_lengths=context.prompt_lengths[row : row + 1],
        lengths=context.lengths[row : row + 1],
        positions=context.positions[row : row + 1],
        rows=context.rows[row : row + 1],
        noise=context.noise.gather([row]),
    )


def ragged(rows: int = 12, vocab: int = 3, longest: int = 15, padding: int | None = 0, **options: object) -> Context:
    """Texts of 1 .. longest tokens from few ids, so that tokens and n-grams repeat; prompts of 1 .. all of them."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    texts = [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]
    prompt_lengths = [1 + int(torch.randint(length, (1,), generator=generator)) for length in lengths]
    prompt_lengths[0] = lengths[0]  # nothing written yet
    return context_of(texts, prompt_lengths, padding=padding, **options)  # type: ignore[arg-type]


def random_logits(rows: int = 12, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ordinary rows, rows full of ties, with -inf, with one possible token, without a preference, of extreme values."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(rows, vocab, generator=generator).to(dtype)
    logits[1::4] = logits[1::4].round()
    logits[2::4] = logits[2::4].masked_fill(torch.rand(logits[2::4].shape, generator=generator) < 0.6, -INF)
    logits[2::4, 0] = 0.5
    logits[3, 1:] = -INF
    logits[7] = 0.0
    logits[11] = logits[11] * 1e4
    return logits


def call(processor, context: Context, logits: Tensor, state=None) -> Tensor:
    if state is None and hasattr(processor, "start"):
        state = processor.start(context)
    return processor(context, logits, state)


def assert_well_behaved(processor, context: Context, logits: Tensor, padded_otherwise: Context | None = None) -> None:
    """Input unchanged, no NaN, dtype kept, batch = alone, permuted rows = permuted result, padding without effect."""
    before, ids = logits.clone(), context.ids.clone()
    state = processor.start(context) if hasattr(processor, "start") else None
    result = processor(context, logits, state)
    assert torch.equal(logits, before)
    assert torch.equal(context.ids, ids)
    assert result.dtype == logits.dtype
    assert not result.isnan().any()
    assert result is not logits
    for row in range(len(logits)):
        alone = processor(row_of(context, row), logits[row : row + 1], gather_state(state, [row]))
        assert torch.equal(alone[0], result[row]), row
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    permuted = dataclasses.replace(
        context,
        ids=context.ids[order],
        prompt_lengths=context.prompt_lengths[order],
        lengths=context.lengths[order],
        positions=context.positions[order.numpy()],
        rows=tuple(context.rows[i] for i in order.tolist()),
        noise=context.noise.gather(order.tolist()),
    )
    assert torch.equal(processor(permuted, logits[order], gather_state(state, order.tolist())), result[order])
    if padded_otherwise is not None:
        assert torch.equal(padded_otherwise.lengths, context.lengths)
        assert not torch.equal(padded_otherwise.ids, context.ids)
        assert torch.equal(processor(padded_otherwise, logits, state), result)


def of_probabilities(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def kept(result: Tensor) -> list[list[int]]:
    """The possible tokens of each row."""
    return [(row > -INF).nonzero().squeeze(1).tolist() for row in result]


def assert_distribution(counts: Tensor, exact: Tensor) -> None:
    """Chi-square at six standard deviations; what is impossible never happens."""
    expected = exact.double() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    freedom = int(possible.sum()) - 1
    statistic = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def filter_values(name: str) -> list[float | bool]:
    """Values of a filter's field that do something, in rising order: what every filter is tried with."""
    rule, off = FIELDS[name].metadata["rule"], FIELDS[name].metadata["off"]
    tried = [True, 1e-6, 1e-3, 0.05, 0.2, 0.5, 0.9, 1, 2, 3, 5, 20]
    return [value for value in tried if rule.accepts(value) and value != off]


def filter_setting(name: str, value: float | bool | None = None) -> dict[str, float | bool]:
    """Settings that ask for one filter: with this value of its field, or with one that is neither weak nor strong."""
    values = filter_values(name)
    return {name: values[len(values) // 2] if value is None else value}


def filter_class(name: str) -> type:
    """The class that a filter's field makes."""
    file, _, kind = FILTERS[name].partition(".")
    return getattr(importlib.import_module(f"minigpt.sampling.processors.{file}"), kind)


def filters_made(name: str) -> list[Any]:
    """A filter's processor at both ends of its field's values, and leaving four tokens."""
    ends = (filter_values(name)[0], filter_values(name)[-1])
    config = [SamplingConfig(**filter_setting(name, value)) for value in ends]
    return [MAKERS[name](Settings([each], None, keep)) for each in config for keep in (1, 4)]
