"""One step of the loop: choose each row's next token, and collect details of the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.sampling.draws.choice import choose
from minigpt.sampling.draws.noise import Purpose
from minigpt.sampling.loop.batch import Batch
from minigpt.sampling.processors.processors import NEVER

Scored = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, the most likely first


class Details(NamedTuple):
    """Rank and log-probabilities of a chosen token and of the most likely tokens."""

    processed_log_prob: float
    """Log-probability of the token after every processor (nats)."""
    rank: int
    """Rank of the token in the model's distribution: 1 is the most likely; tied tokens share the best rank."""
    top: Scored
    """The model's most likely tokens."""
    processed_top: Scored
    """The most likely tokens after every processor; fewer if fewer are possible."""


class Stage(NamedTuple):
    """The distribution after one processor."""

    name: str
    """Name of the processor; "model" before the first."""
    possible: int
    """Number of tokens with a probability above 0."""
    removed: int
    """Number of tokens that this processor removed."""
    probabilities: dict[int, float]
    """Token -> probability, for the same tokens at every stage: the most likely ones at the first and at the last
    stage, and the chosen one."""


class Choice(NamedTuple):
    """The next token of a row, or an error."""

    token: int
    log_prob: float
    """The model's log-probability of the token, before any processor (nats)."""
    error: str | None = None
    details: Details | None = None
    work: tuple[Stage, ...] = ()


@torch.no_grad()
def take_turn(batch: Batch, top: int | None = None, show: int = 0) -> list[Choice]:
    """Choose and append the next token of every row.

    Args:
        batch: the rows.
        top: number of most likely tokens in `Choice.details`; None for no details.
        show: number of most likely tokens that `Choice.work` shows at every stage; 0 for none.
    """
    raw = batch.read()
    context, states = batch.context, batch.states
    greedy = batch.pipeline.greedy(context)
    processed = batch.process(raw, greedy)
    tokens = choose(processed, None if all(greedy) else context.uniform(Purpose.CHOICE), greedy)
    forced = [_forced(row.forced, row.left) if row.forced else None for row in batch.rows]
    if any(token is not None for token in forced):
        own = tokens.tolist()
        tokens = torch.tensor(
            [mine if token is None else token for token, mine in zip(forced, own, strict=True)], device=tokens.device
        )
    column = tokens.unsqueeze(1)
    log_probs = raw.log_softmax(-1).gather(1, column)
    # One transfer to the host for everything: float64 represents every token id exactly.
    host = torch.cat((column.double(), log_probs.double(), processed.amax(-1, keepdim=True).double()), dim=1).tolist()
    details = _details(raw, processed, column, top) if top is not None else [None] * len(host)
    works = _work(batch, raw, [int(row[0]) for row in host], show) if show else [()] * len(host)
    choices = []
    for row, (token, log_prob, peak) in enumerate(host):
        sound = not math.isnan(log_prob) and (math.isfinite(peak) or forced[row] is not None)
        error = None if sound else batch.pipeline.blame(context, raw, states, row)
        choices.append(Choice(int(token), log_prob, error, details[row], works[row]))
    batch.take(tokens, raw, processed, [choice.token for choice in choices])
    return choices


def _forced(forced: Sequence[int], left: int) -> int | None:
    """The next forced token of a row, if any: the forced tokens are the last ones of the row, and `left` remain."""
    return forced[len(forced) - left] if 0 < left <= len(forced) else None


def _details(raw: Tensor, processed: Tensor, column: Tensor, top: int) -> list[Details]:
    before, after = raw.log_softmax(-1), processed.log_softmax(-1)
    chosen = after.gather(1, column).squeeze(1).tolist()
    ranks = (1 + (raw > raw.gather(1, column)).sum(-1)).tolist()
    return [Details(*each) for each in zip(chosen, ranks, _top(before, top), _top(after, top), strict=True)]


def _top(log_probs: Tensor, count: int) -> list[Scored]:
    values, tokens = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return [
        tuple((token, value) for token, value in zip(*pair, strict=True) if value > NEVER)
        for pair in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


def _work(batch: Batch, raw: Tensor, chosen: list[int], show: int) -> list[tuple[Stage, ...]]:
    """The stages of each row, computed by running the processors a second time, one by one."""
    names, stages = zip(*batch.pipeline.stages(batch.context, raw, batch.states), strict=True)
    probabilities = [logits.softmax(-1) for logits in stages]
    here = [logits > NEVER for logits in stages]
    possible = [each.sum(-1).tolist() for each in here]
    removed = [(before & ~after).sum(-1).tolist() for before, after in zip([here[0], *here], here, strict=False)]
    works = []
    for row, token in enumerate(chosen):
        ends = (probabilities[-1], probabilities[0])
        likeliest = [token for each in ends for token, _ in _top(each[row : row + 1].log(), show)[0]]
        shown = list(dict.fromkeys([*likeliest, token]))
        works.append(
            tuple(
                Stage(name, possible[i][row], removed[i][row], _at(probabilities[i][row], shown))
                for i, name in enumerate(names)
            )
        )
    return works


def _at(probabilities: Tensor, tokens: list[int]) -> dict[int, float]:
    return dict(zip(tokens, probabilities[tokens].tolist(), strict=True))
