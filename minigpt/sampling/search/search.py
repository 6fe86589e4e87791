"""Beam search: several continuations of a prompt in parallel, returned by score.

One loop serves every method. A step has the model read the beams of all prompts in one batch, ranks their continuations
(`expansion`) and lets each group of beams decide what goes on and what ends (`hypotheses`); then the batch's rows
become copies of the rows that go on. The methods differ in the ranking and in the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.sampling.draws.choice import is_choosable
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.draws.noise import Noise, fresh_seed
from minigpt.sampling.loop.batch import Batch, Row, window_start
from minigpt.sampling.loop.loop import check_prompts, evaluating
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.search.constraints import Constraint, required
from minigpt.sampling.search.expansion import RANKINGS, Ranking, Step, candidates, drawn_by, root_key
from minigpt.sampling.search.hypotheses import (
    NEVER,
    Beam,
    ConstrainedGroup,
    Group,
    Hypothesis,
    SearchSettings,
    StochasticGroup,
)
from minigpt.sampling.settings.config import check_field


@torch.no_grad()
def search_rows(
    model: Decodable,
    prompts: Sequence[Sequence[int]],
    settings: SearchSettings,
    *,
    max_new_tokens: int | Sequence[int],
    processors: Sequence[Callable] = (),
    feed: Literal["log_probs", "logits"] = "log_probs",
    seeds: Sequence[int | None] | None = None,
    end_ids: Sequence[int] = (),
    overflow: str = "slide",
    stopped: Callable[[int, list[int]], bool] | None = None,
    constraints: Sequence[Sequence[Constraint]] = (),
    numbers: Sequence[int] | None = None,
    draw: Callable[[Tensor, int], Tensor] | None = None,
) -> list[list[Hypothesis]]:
    """Continue token prompts by a search: for each prompt the best texts that it found, the best first.

    A prompt gets what it gets alone. There are fewer than num_return_sequences where fewer were found, but at least
    one; where every beam was left without a token to choose, that one is an error.

    Args:
        model: what predicts.
        prompts: token ids, at least one each.
        settings: how to search.
        max_new_tokens: most tokens to write, for all or for each prompt.
        processors: applied in this order; those that only shape the distribution are left out where nothing is drawn.
        feed: "log_probs": processors see the model's log-probabilities, and what they make of them is added up as it
            is, even if it no longer is a distribution (as in transformers). "logits": they see the logits, and the
            log-probabilities of what they make of them are added up. "stochastic" search normalises either.
        seeds: one for each prompt; None draws a fresh one. Only what draws depends on them. A processor's own noise is
            the same for all beams of a prompt.
        end_ids: tokens that end a text; they count as written.
        overflow: "slide" moves the window on past the model's context, "stop" ends a text that has filled it.
        stopped: tells from a prompt's number and the written tokens whether a text ends here, as an end token would.
        numbers: what processors and `stopped` are told as the prompts' numbers; None for 0, 1, 2, ...
        constraints: for each prompt, what must appear: each constraint a list of alternative phrases of tokens.
        draw: draws in place of the prompts' own noise for "sample"; see `expansion.drawn_by`.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a prompt longer than the context with "stop", a
            seed out of range, something among the processors that is none, constraints that cannot be met or do not
            go with the settings, a temperature of 0 where a method draws.
    """
    check_prompts(prompts, model.vocab_size, model.max_context if overflow == "stop" else None)
    end_ids = tuple(map(int, end_ids))
    draws = settings.method != "beam"
    pipeline = Pipeline([p for p in processors if draws or not getattr(p, "shaping", False)])
    most = _for_each("max_new_tokens", max_new_tokens, len(prompts))
    own_seeds = [fresh_seed() if seed is None else int(seed) for seed in _for_each("seed", seeds, len(prompts))]
    if constraints and (draws or settings.num_beam_groups > 1):
        raise ConfigError("sampling: constraints need method 'beam' and num_beam_groups 1; expected these, or none")
    phrases = required(constraints or [()] * len(prompts), most, end_ids, model.vocab_size)

    called = list(range(len(prompts)) if numbers is None else numbers)

    def make(number: int, place: int) -> Group:
        """Group `place` of a prompt."""
        limit = min(most[number], model.max_context - len(prompts[number])) if overflow == "stop" else most[number]

        def reason(written: tuple[int, ...]) -> str | None:
            if written and written[-1] in end_ids:
                return "end"
            if written and stopped is not None and stopped(called[number], list(written)):
                return "stop"
            if len(written) < limit:
                return None
            return "length" if limit == most[number] else "context"

        looked_at = settings.width * (1 if settings.method == "stochastic" else max(2, 1 + len(end_ids)))
        given = (settings, number, place, limit, reason, looked_at)
        if phrases[number].constraints:
            return ConstrainedGroup(*given, phrases=phrases[number], end_ids=end_ids)
        if settings.method == "stochastic":
            position = np.array([len(prompts[number])])
            return StochasticGroup(*given, [Beam(key=root_key(Noise([own_seeds[number]], [0]), position))])
        return Group(*given)

    groups = [make(number, place) for number in range(len(prompts)) for place in range(settings.num_beam_groups)]
    started = [group for group in groups if group.limit > 0]
    if started:
        rows = [Row(called[g.prompt], 0, own_seeds[g.prompt], list(prompts[g.prompt]), g.limit) for g in started]
        with evaluating(model):
            batch = Batch(model, rows, pipeline, end_ids)
            if draws and any(pipeline.greedy(batch.context)):
                raise ConfigError(
                    f"sampling: a temperature is 0, which leaves method {settings.method!r} nothing to draw; expected "
                    "one above 0, or method 'beam'"
                )
            ranking = drawn_by(draw) if draw and settings.method == "sample" else RANKINGS[settings.method]
            _Search(batch, started, ranking, feed == "logits", settings).run()
    return [
        _best([group for group in groups if group.prompt == number], settings, seed)
        for number, seed in enumerate(own_seeds)
    ]


class _Search:
    """The loop. A group's beams are rows of the batch side by side, in the groups' order."""

    def __init__(
        self, batch: Batch, groups: list[Group], ranking: Ranking, feeds_logits: bool, settings: SearchSettings
    ) -> None:
        self.batch, self.groups, self.ranking, self.settings = batch, groups, ranking, settings
        self.feeds_logits = feeds_logits
        self.normalises = feeds_logits or settings.method == "stochastic"

    def run(self) -> None:
        """Take steps until every group is done."""
        batch = self.batch
        while self.groups:
            raw = batch.read()
            own = raw.log_softmax(-1)
            fed = raw if self.feeds_logits else own
            processed = batch.process(fed)
            log_probs = processed.double()  # sums of many are kept in float64
            if self.normalises:
                log_probs = log_probs.log_softmax(-1)
            log_probs = log_probs.masked_fill(~is_choosable(log_probs).unsqueeze(1), NEVER)
            spans = self._spans()
            for place in range(self.settings.num_beam_groups):
                self._advance(place, spans, own, log_probs)
            for group, span in zip(self.groups, spans, strict=True):
                if not group.beams and not group.found():
                    group.error = batch.pipeline.blame(batch.context, fed, batch.states, span[0])
            self._move(spans, raw, processed)

    def _spans(self) -> list[range]:
        """The rows of each group's beams."""
        ends = list(accumulate(len(group.beams) for group in self.groups))
        return [range(end - len(group.beams), end) for end, group in zip(ends, self.groups, strict=True)]

    def _advance(self, place: int, spans: list[range], own: Tensor, log_probs: Tensor) -> None:
        """Let the groups of this number, one of each prompt, go on to the next length."""
        turn = [group for group in self.groups if group.number == place]
        if not turn:
            return
        index = [row for group, span in zip(self.groups, spans, strict=True) if group.number == place for row in span]
        beams = [beam for group in turn for beam in group.beams]
        totals = log_probs[index] + log_probs.new_tensor([beam.total for beam in beams]).unsqueeze(1)
        if place and self.settings.diversity_penalty:
            self._lower_taken(turn, totals)
        noise = self.batch.context.noise.gather(index)
        step = Step(turn, totals, own[index], self.batch.context.positions[index], noise)
        for group, found in zip(turn, list(candidates(step, self.ranking(step))), strict=True):
            group.advance(found)

    def _lower_taken(self, turn: list[Group], totals: Tensor) -> None:
        """Subtract the diversity penalty for each beam of the prompt's earlier groups that has just taken a token."""
        rows, taken = [], []
        row = 0
        for group in turn:
            earlier = [g for g in self.groups if g.prompt == group.prompt and g.number < group.number]
            tokens = [token for other in earlier for token in other.taken]
            for _ in group.beams:
                rows += [row] * len(tokens)
                taken += tokens
                row += 1
        index = torch.tensor([rows, taken], dtype=torch.int64, device=totals.device).unbind()
        totals.index_put_(index, totals.new_tensor(-self.settings.diversity_penalty), accumulate=True)

    def _move(self, spans: list[range], raw: Tensor, processed: Tensor) -> None:
        """Make the batch's rows those of the beams that go on, each with its new token."""
        parents = []
        for group, span in zip(self.groups, spans, strict=True):
            group.beams = _in_place(group.beams)
            parents += [span[beam.parent] for beam in group.beams]
        self.groups = [group for group in self.groups if group.beams]
        if not parents:
            return
        tokens = [beam.written[-1] for group in self.groups for beam in group.beams]
        if parents != list(range(len(self.batch.rows))):
            self.batch.gather(parents, self._agreement(parents))
            raw, processed = raw[parents], processed[parents]
        self.batch.take(torch.tensor(tokens, device=raw.device), raw, processed, tokens)

    def _agreement(self, parents: list[int]) -> int:
        """How many tokens in view each row has in common with the row that it becomes a copy of."""
        rows, context = self.batch.rows, self.batch.model.max_context
        if len(parents) != len(rows):
            return 0
        views = [row.tokens[window_start(len(row.tokens), context) :] for row in rows]
        return min(
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(views[row], views[parent], strict=False)))
            for row, parent in enumerate(parents)
            if row != parent
        )


def _in_place(beams: list[Beam]) -> list[Beam]:
    """The beams in an order in which as many as can be stand where their parents stood, so that fewer are copied."""
    staying: dict[int, Beam] = {}
    for beam in beams:
        if beam.parent < len(beams):
            staying.setdefault(beam.parent, beam)
    movers = iter([beam for beam in beams if staying.get(beam.parent) is not beam])
    return [staying[place] if place in staying else next(movers) for place in range(len(beams))]


def _best(groups: list[Group], settings: SearchSettings, seed: int) -> list[Hypothesis]:
    """The best texts of a prompt's groups."""
    first = groups[0]
    if first.limit <= 0:
        reason, complete = str(first.reason(())), first.complete(first.beams[0])
        return [Hypothesis([], 0.0, 0.0, [], reason, complete=complete, seed=seed)]
    ended = [
        Hypothesis(
            list(beam.written),
            group.score(beam),
            beam.total,
            list(beam.log_probs),
            str(beam.reason),
            complete=group.complete(beam),
            seed=seed,
        )
        for group in groups
        for beam in group.found()
    ]
    if not ended:
        return [Hypothesis([], NEVER, NEVER, [], "error", groups[-1].error, complete=False, seed=seed)]
    if len(groups) > 1:
        ended.sort(key=lambda hypothesis: -hypothesis.score)
    return ended[: settings.num_return_sequences]


def _for_each(field: str, values: Any, count: int) -> list[Any]:
    """A field's checked value for each prompt."""
    values = list(values) if isinstance(values, Sequence) else [values] * count
    if len(values) != count:
        raise ConfigError(f"sampling: {field} has {len(values)} values; expected one for each of {count} prompts")
    for value in values:
        check_field(field, value)
    return values
