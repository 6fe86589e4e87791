"""Beam search: several continuations of a prompt in parallel, returned by score.

All methods share one loop. In each step the model reads the beams of all prompts in one batch, `expansion` ranks their
continuations, and each group of beams decides which continue and which end (`hypotheses`). Then the rows of the batch
become copies of the rows that continue. The methods differ in the ranking and in the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, takewhile
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.modes import evaluating
from minigpt.sampling.draws.choice import is_choosable
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.draws.noise import Noise, fresh_seed
from minigpt.sampling.loop.batch import Batch, Row, window_start
from minigpt.sampling.loop.loop import check_prompts
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
    """Continue token prompts by beam search.

    The result of a prompt does not depend on the other prompts. It has fewer than num_return_sequences hypotheses if
    fewer were found, but at least one; if no beam has a possible token left, that one is an error.

    Args:
        model: the model that predicts the next token.
        prompts: token ids, at least one per prompt.
        settings: how to search.
        max_new_tokens: maximum number of tokens to generate; one number, or one per prompt.
        processors: applied in this order; those that only shape the distribution are skipped unless the method samples.
        feed: "log_probs": processors get the model's log-probabilities, and beam scores sum their output unchanged,
            even if it is no longer normalised (as in transformers). "logits": processors get the logits, and beam
            scores sum the log-softmax of their output. "stochastic" search always normalises the output.
        seeds: one per prompt; None draws a random seed. Only methods that sample depend on it. The random numbers of a
            processor are the same for all beams of a prompt.
        end_ids: tokens that end a text; they are among the generated tokens.
        overflow: "slide" moves the window past the model's context, "stop" ends a text that has filled the context.
        stopped: takes a prompt's number and its generated tokens; returns whether the text ends here, as at an end
            token.
        numbers: the prompts' numbers for processors and `stopped`; None for 0, 1, 2, ...
        constraints: per prompt, a list of constraints; each is a list of alternative token sequences, one of which must
            appear.
        draw: for "sample", replaces sampling with the prompts' own random numbers; see `expansion.drawn_by`.

    Returns:
        For each prompt its hypotheses, best first.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a prompt longer than the context with "stop", a
            seed out of range, an invalid processor, constraints that cannot be met or do not work with the settings, or
            a temperature of 0 with a method that samples.
    """
    check_prompts(prompts, model.vocab_size, model.max_context if overflow == "stop" else None, numbers)
    end_ids = tuple(map(int, end_ids))
    draws = settings.method != "beam"
    pipeline = Pipeline([p for p in processors if draws or not getattr(p, "shaping", False)])
    most = _for_each("max_new_tokens", max_new_tokens, len(prompts))
    own_seeds = [fresh_seed() if seed is None else int(seed) for seed in _for_each("seed", seeds, len(prompts))]
    if constraints and (draws or settings.num_beam_groups > 1):
        raise ConfigError("sampling: constraints need method 'beam' and num_beam_groups 1; set both, or no constraints")
    phrases = required(constraints or [()] * len(prompts), most, end_ids, model.vocab_size)

    called = list(range(len(prompts)) if numbers is None else numbers)

    def make(number: int, place: int) -> Group:
        """Create group `place` of a prompt."""
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
                    f"sampling: method {settings.method!r} samples, but a temperature is 0; set it above 0, or use "
                    "method 'beam'"
                )
            ranking = drawn_by(draw) if draw and settings.method == "sample" else RANKINGS[settings.method]
            _Search(batch, started, ranking, feed == "logits", settings).run()
    return [
        _best([group for group in groups if group.prompt == number], settings, seed)
        for number, seed in enumerate(own_seeds)
    ]


class _Search:
    """The search loop. The beams of a group are adjacent rows of the batch, in the order of the groups."""

    def __init__(
        self, batch: Batch, groups: list[Group], ranking: Ranking, feeds_logits: bool, settings: SearchSettings
    ) -> None:
        self.batch, self.groups, self.ranking, self.settings = batch, groups, ranking, settings
        self.feeds_logits = feeds_logits
        self.normalises = feeds_logits or settings.method == "stochastic"

    def run(self) -> None:
        """Run steps until every group is done."""
        batch = self.batch
        while self.groups:
            raw = batch.read()
            own = raw.log_softmax(-1)
            fed = raw if self.feeds_logits else own
            processed = batch.process(fed)
            log_probs = processed.double()  # beam scores are summed in float64
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
        """The batch rows of each group's beams."""
        ends = list(accumulate(len(group.beams) for group in self.groups))
        return [range(end - len(group.beams), end) for end, group in zip(ends, self.groups, strict=True)]

    def _advance(self, place: int, spans: list[range], own: Tensor, log_probs: Tensor) -> None:
        """Extend the beams of group `place` of every prompt by one token."""
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
        """Subtract the diversity penalty from a token for each beam of an earlier group that has just chosen it."""
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
        """Rearrange the batch's rows to the beams that continue and append their new tokens."""
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
        """The number of leading tokens in the window that every row shares with the row it becomes a copy of."""
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
    """Order the beams so that as many as possible keep their parent's row, which saves copies."""
    staying: dict[int, Beam] = {}
    for beam in beams:
        if beam.parent < len(beams):
            staying.setdefault(beam.parent, beam)
    movers = iter([beam for beam in beams if staying.get(beam.parent) is not beam])
    return [staying[place] if place in staying else next(movers) for place in range(len(beams))]


def _best(groups: list[Group], settings: SearchSettings, seed: int) -> list[Hypothesis]:
    """The best hypotheses of a prompt's groups."""
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
    """Check a field's values and return one per prompt."""
    values = list(values) if isinstance(values, Sequence) else [values] * count
    if len(values) != count:
        raise ConfigError(f"sampling: {field} has {len(values)} values; expected one for each of {count} prompts")
    for value in values:
        check_field(field, value)
    return values
