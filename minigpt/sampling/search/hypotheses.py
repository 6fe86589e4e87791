"""The candidates of a search: how they are scored, which are extended, when the search can stop.

No tensor here: a step hands in the best continuations of each beam as plain numbers, and the rest is a matter of a few
texts per prompt. The rules are those of transformers' beam search, named after its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Literal, NamedTuple

from minigpt.errors import ConfigError
from minigpt.sampling.search.constraints import Phrases, Progress
from minigpt.sampling.settings.rules import COUNT, NOT_NEGATIVE, Rule, check, is_number

NEVER = float("-inf")

_EARLY = Rule(lambda v: isinstance(v, bool) or v == "never", "True, False or 'never'")
_METHOD = Rule(lambda v: v in ("beam", "sample", "stochastic"), "'beam', 'sample' or 'stochastic'")
_PENALTY = Rule(lambda v: is_number(v) and abs(v) <= 20, "a number from -20 to 20")  # length ** penalty stays finite


@dataclass(frozen=True)
class SearchSettings:
    """Settings of beam search."""

    num_beams: int
    """K: number of beams per prompt."""
    num_return_sequences: int = 1
    """Number of best texts to return; at most num_beams."""
    length_penalty: float = 1.0
    """A text's score is the sum of its tokens' log-probabilities divided by its length to this power: above 0 favours
    long texts, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """When a prompt with K finished texts is done. True: at once. False: when the best beam, if it ended now, would not
    be among the best K. "never": when no beam can get among the best K at any length."""
    method: Literal["beam", "sample", "stochastic"] = "beam"
    """"beam" keeps the most likely beams, "sample" samples continuations, "stochastic" samples whole texts without
    replacement."""
    num_beam_groups: int = 1
    """Diverse beam search: the beams are divided into this many groups of equal size, each with its own search
    (Vijayakumar et al., 2016, arXiv:1610.02424)."""
    diversity_penalty: float = 0.0
    """Subtracted from a token's log-probability for each beam of an earlier group that chose the token at the same
    step."""

    def __post_init__(self) -> None:
        check(self, num_beams=COUNT, num_return_sequences=COUNT, num_beam_groups=COUNT)
        check(self, length_penalty=_PENALTY, early_stopping=_EARLY, method=_METHOD, diversity_penalty=NOT_NEGATIVE)
        for name in ("num_beams", "num_return_sequences", "num_beam_groups"):
            object.__setattr__(self, name, int(getattr(self, name)))
        problems = {
            f"num_return_sequences is {self.num_return_sequences}; expected at most num_beams ({self.num_beams})": (
                self.num_return_sequences > self.num_beams
            ),
            f"num_beams is {self.num_beams}; expected a multiple of num_beam_groups ({self.num_beam_groups})": (
                self.num_beams % self.num_beam_groups != 0
            ),
            f"num_beam_groups is {self.num_beam_groups}; expected 1 with method {self.method!r}": (
                self.num_beam_groups > 1 and self.method != "beam"
            ),
            f"length_penalty is {self.length_penalty!r} and early_stopping {self.early_stopping!r}; expected 1.0 and "
            "False with method 'stochastic'": (
                self.method == "stochastic" and (self.length_penalty, self.early_stopping) != (1.0, False)
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ConfigError(f"sampling: SearchSettings's {problem}")

    @property
    def width(self) -> int:
        """Number of beams per group."""
        return self.num_beams // self.num_beam_groups


@dataclass(frozen=True)
class Hypothesis:
    """A text that the search found."""

    tokens: list[int]
    """The generated tokens, including the end token."""
    score: float
    """The score that texts are ranked by: log_prob / length ** length_penalty; for "stochastic", the perturbed
    log-probability."""
    log_prob: float
    """The beam's summed log-probability, including processors and diversity penalty (nats)."""
    log_probs: list[float]
    """The model's log-probability of each token, before any processor (nats)."""
    finish_reason: str
    """end (end token), stop, length (max_new_tokens), context (the model's context is full), or error."""
    error: str | None = None
    """The error message if finish_reason is error."""
    complete: bool = True
    """Whether the text meets all constraints."""
    seed: int = 0
    """Random seed of its prompt."""


class Candidate(NamedTuple):
    """A beam extended by one token."""

    key: float
    """Sort key: candidates are considered in descending order."""
    total: float
    """The summed log-probability."""
    beam: int
    """Index of the beam in its group."""
    token: int
    log_prob: float
    """The model's log-probability of the token."""


@dataclass(frozen=True)
class Beam:
    """A text during the search, or a finished one."""

    written: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    total: float = 0.0
    key: float = 0.0
    parent: int = 0
    """Index, in its group, of the beam that it extends."""
    reason: str | None = None
    """The finish reason; None while the beam continues."""
    progress: Progress | None = None
    """Progress towards the constraints."""


@dataclass
class Group:
    """The beams of a prompt that compete with each other, and those that have finished."""

    settings: SearchSettings
    prompt: int
    number: int
    """Index of the group among those of its prompt."""
    limit: int
    """Maximum number of tokens to generate."""
    reason: Callable[[tuple[int, ...]], str | None]
    """Takes the generated tokens; returns the finish reason, or None if the text continues."""
    looked_at: int
    """Number of candidates considered in a step: more than K, so that K beams can continue when some end."""
    beams: list[Beam] = field(default_factory=lambda: [Beam()])
    finished: list[Beam] = field(default_factory=list)
    """The best K finished texts, best first."""
    taken: list[int] = field(default_factory=list)
    """The tokens that its beams chose in this step, except tokens that end a text."""
    error: str | None = None

    def score(self, beam: Beam) -> float:
        """The summed log-probability divided by length ** length_penalty."""
        return beam.total / len(beam.written) ** self.settings.length_penalty

    def wanted(self, beam: Beam) -> set[int]:
        """Tokens to consider after a beam in addition to the most likely ones."""
        return set()

    def complete(self, beam: Beam) -> bool:
        """Whether a text meets all constraints."""
        return True

    def found(self) -> list[Beam]:
        """The finished texts, best first."""
        return self.finished

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Extend the beams by one token.

        Args:
            candidates: in descending order of their keys; at least the best `looked_at` of each beam.
        """
        # Sampled candidates come in the order of sampling; sort by score, since only the best K may end.
        picked = sorted(candidates[: self.looked_at], key=lambda candidate: -candidate.total)
        self._settle([self.child(candidate) for candidate in picked])
        self.beams.sort(key=lambda beam: -beam.total)
        self._close()

    def child(self, candidate: Candidate) -> Beam:
        """The beam of a candidate."""
        parent = self.beams[candidate.beam]
        written = (*parent.written, candidate.token)
        log_probs = (*parent.log_probs, candidate.log_prob)
        return Beam(written, log_probs, candidate.total, candidate.key, candidate.beam, self.reason(written))

    def _settle(self, children: list[Beam]) -> None:
        """Move children that ended to the finished texts if they are among the first K; the others continue."""
        ended = [child for child in children[: self.settings.width] if child.reason]
        self.finished = sorted([*self.finished, *ended], key=lambda beam: -self.score(beam))[: self.settings.width]
        self.beams = [child for child in children if not child.reason]
        going = [child for child in children if child.reason not in ("end", "stop")]
        self.taken = [child.written[-1] for child in going[: self.settings.width]]

    def _close(self) -> None:
        """Keep the first K beams, or none if the stopping rule says that no better text can follow."""
        self.beams = self.beams[: self.settings.width]
        if self.beams and len(self.finished) == self.settings.width:
            early, penalty = self.settings.early_stopping, self.settings.length_penalty
            length = self.limit if early == "never" and penalty > 0 else len(self.beams[0].written)
            hoped_for = max(beam.total for beam in self.beams) / length**penalty
            if early is True or hoped_for <= self.score(self.finished[-1]):
                self.beams = []


class StochasticGroup(Group):
    """Stochastic beam search: keeps the K texts with the largest perturbed log-probabilities, finished or not."""

    def score(self, beam: Beam) -> float:
        """The perturbed log-probability."""
        return beam.key

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Extend the beams by one token.

        A continuation's key is never larger than its parent's, so a dropped text cannot come back.
        """
        children = [self.child(candidate) for candidate in candidates[: self.looked_at]]
        nodes = sorted([*self.finished, *children], key=lambda beam: -beam.key)[: self.settings.width]
        self.finished = [node for node in nodes if node.reason]
        self.beams = [node for node in nodes if not node.reason]


@dataclass
class ConstrainedGroup(Group):
    """Constrained beam search: texts must contain certain phrases (Post and Vilar, 2018, arXiv:1804.06609).

    Candidates are grouped into banks by the number of tokens they still need, and every bank gets a share of the beams.
    So a text that starts a phrase does not compete with one that postpones it. Candidates that need more tokens than
    remain are dropped, unless all do. Only a text with all phrases can finish; if there is none, the result is the
    incomplete texts that need the fewest tokens.
    """

    phrases: Phrases = field(kw_only=True)
    end_ids: tuple[int, ...] = field(kw_only=True)
    incomplete: list[Beam] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.beams = [Beam(progress=self.phrases.start)]

    def need(self, beam: Beam) -> int:
        """Minimum number of tokens that a text still needs to meet all constraints."""
        assert beam.progress is not None
        return self.phrases.need(beam.progress)

    def wanted(self, beam: Beam) -> set[int]:
        """Tokens that bring a beam closer to meeting all constraints; the end tokens if it already meets them."""
        assert beam.progress is not None
        return self.phrases.nearer(beam.progress) if self.need(beam) else set(self.end_ids)

    def complete(self, beam: Beam) -> bool:
        """Whether a text meets all constraints."""
        return self.need(beam) == 0

    def found(self) -> list[Beam]:
        """The finished texts, best first; if there are none, incomplete texts, fewest needed tokens first."""
        return self.finished or self.incomplete

    def child(self, candidate: Candidate) -> Beam:
        """The beam of a candidate, with its progress towards the constraints."""
        child = super().child(candidate)
        progress = self.beams[candidate.beam].progress
        assert progress is not None
        return replace(child, progress=self.phrases.after(progress, candidate.token))

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Extend the beams by one token, taking candidates from each bank alternately."""
        children = sorted(map(self.child, candidates), key=lambda child: -child.total)
        lost = [child for child in children if child.reason and self.need(child)]
        least = sorted([*self.incomplete, *lost], key=lambda beam: (self.need(beam), -self.score(beam)))
        self.incomplete = least[: self.settings.width]
        children = [child for child in children if not (child.reason and self.need(child))]
        room = self.limit - len(self.beams[0].written) - 1
        in_time = [child for child in children if self.need(child) <= room]
        banks: dict[int, list[Beam]] = {}
        for child in in_time or children:
            banks.setdefault(self.need(child), []).append(child)
        in_turn = zip_longest(*(bank for _, bank in sorted(banks.items())))
        self._settle([child for turn in in_turn for child in turn if child is not None])
        self._close()
