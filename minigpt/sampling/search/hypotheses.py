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
    """How to search."""

    num_beams: int
    """K: texts of a prompt that are followed at once."""
    num_return_sequences: int = 1
    """How many of the best are returned; at most num_beams."""
    length_penalty: float = 1.0
    """A text's score is the sum of its tokens' log-probabilities over their number to this power: above 0 favours
    long texts, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """When a prompt with K finished texts is done. True: at once. False: when the best beam, finished now, would not
    be among them. "never": when no beam can get among them at any length."""
    method: Literal["beam", "sample", "stochastic"] = "beam"
    """"beam" follows the best, "sample" draws continuations, "stochastic" draws whole texts without replacement."""
    num_beam_groups: int = 1
    """The beams are divided into groups of equal size, each a search of its own (Vijayakumar et al., 2016,
    arXiv:1610.02424) ..."""
    diversity_penalty: float = 0.0
    """... in which a token's log-probability is lowered by this for each beam of an earlier group that has just
    taken it."""

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
            "False with method 'stochastic', which draws texts whatever their length": (
                self.method == "stochastic" and (self.length_penalty, self.early_stopping) != (1.0, False)
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ConfigError(f"sampling: SearchSettings's {problem}")

    @property
    def width(self) -> int:
        """Beams of a group."""
        return self.num_beams // self.num_beam_groups


@dataclass(frozen=True)
class Hypothesis:
    """A text that a search found."""

    tokens: list[int]
    """What was written, with its end token."""
    score: float
    """What texts are ranked by: log_prob / length ** length_penalty; for "stochastic" the perturbed log-probability."""
    log_prob: float
    """The sum that the search added up, processors and diversity penalty included (nats)."""
    log_probs: list[float]
    """The model's own log-probability of each token, before any processor (nats)."""
    finish_reason: str
    """end (end token), stop, length (max_new_tokens), context (the model's context is full), or error."""
    error: str | None = None
    """Why, where the reason is error."""
    complete: bool = True
    """Whether it holds all that had to appear."""
    seed: int = 0
    """The seed of its prompt's noise."""


class Candidate(NamedTuple):
    """A beam continued by a token."""

    key: float
    """Candidates are looked at in the order of their keys, the greatest first."""
    total: float
    """The sum of log-probabilities."""
    beam: int
    """The number of the beam in its group."""
    token: int
    log_prob: float
    """The model's own log-probability of the token."""


@dataclass(frozen=True)
class Beam:
    """A text on its way, or ended."""

    written: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    total: float = 0.0
    key: float = 0.0
    parent: int = 0
    """The number, in its group, of the beam that it continues."""
    reason: str | None = None
    """Why it ended."""
    progress: Progress | None = None
    """What it has of the phrases that must appear."""


@dataclass
class Group:
    """The beams of a prompt that compete with each other, and those that have ended."""

    settings: SearchSettings
    prompt: int
    number: int
    """Which of the prompt's groups it is."""
    limit: int
    """Most tokens that may be written."""
    reason: Callable[[tuple[int, ...]], str | None]
    """Why a text ends here, if it does."""
    looked_at: int
    """Candidates that count in a step. More than K, so that there are K to go on with where some end."""
    beams: list[Beam] = field(default_factory=lambda: [Beam()])
    finished: list[Beam] = field(default_factory=list)
    """The best K ended texts, the best first."""
    taken: list[int] = field(default_factory=list)
    """The tokens that its beams have just taken, those that end a text of themselves left out."""
    error: str | None = None

    def score(self, beam: Beam) -> float:
        """The sum of log-probabilities over length ** length_penalty."""
        return beam.total / len(beam.written) ** self.settings.length_penalty

    def wanted(self, beam: Beam) -> set[int]:
        """Tokens to consider after a beam besides the likeliest."""
        return set()

    def complete(self, beam: Beam) -> bool:
        """Whether a text holds all that must appear."""
        return True

    def found(self) -> list[Beam]:
        """The ended texts, the best first."""
        return self.finished

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Go on to the next length.

        Args:
            candidates: in order; for each beam at least its best `looked_at`.
        """
        # Drawn ones come in the order of the draw: the best of them may end, not the first.
        picked = sorted(candidates[: self.looked_at], key=lambda candidate: -candidate.total)
        self._settle([self.child(candidate) for candidate in picked])
        self.beams.sort(key=lambda beam: -beam.total)
        self._close()

    def child(self, candidate: Candidate) -> Beam:
        """The text that a candidate stands for."""
        parent = self.beams[candidate.beam]
        written = (*parent.written, candidate.token)
        log_probs = (*parent.log_probs, candidate.log_prob)
        return Beam(written, log_probs, candidate.total, candidate.key, candidate.beam, self.reason(written))

    def _settle(self, children: list[Beam]) -> None:
        """Let those that ended into the finished ones, if they are among the first K, and the others go on."""
        ended = [child for child in children[: self.settings.width] if child.reason]
        self.finished = sorted([*self.finished, *ended], key=lambda beam: -self.score(beam))[: self.settings.width]
        self.beams = [child for child in children if not child.reason]
        going = [child for child in children if child.reason not in ("end", "stop")]
        self.taken = [child.written[-1] for child in going[: self.settings.width]]

    def _close(self) -> None:
        """Keep the first K beams; none if nothing that they lead to can get among the finished ones."""
        self.beams = self.beams[: self.settings.width]
        if self.beams and len(self.finished) == self.settings.width:
            early, penalty = self.settings.early_stopping, self.settings.length_penalty
            length = self.limit if early == "never" and penalty > 0 else len(self.beams[0].written)
            hoped_for = max(beam.total for beam in self.beams) / length**penalty
            if early is True or hoped_for <= self.score(self.finished[-1]):
                self.beams = []


class StochasticGroup(Group):
    """Texts drawn without replacement: the K greatest perturbed log-probabilities, ended or not, stay."""

    def score(self, beam: Beam) -> float:
        """The perturbed log-probability."""
        return beam.key

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Go on to the next length. What follows a text has no greater key, so that what falls out stays out."""
        children = [self.child(candidate) for candidate in candidates[: self.looked_at]]
        nodes = sorted([*self.finished, *children], key=lambda beam: -beam.key)[: self.settings.width]
        self.finished = [node for node in nodes if node.reason]
        self.beams = [node for node in nodes if not node.reason]


@dataclass
class ConstrainedGroup(Group):
    """Beams that have to come by certain phrases (Post and Vilar, 2018, arXiv:1804.06609).

    Candidates are banked by how many tokens they still need, and every bank has its share of the beams: a text that
    begins a phrase is not weighed against one that puts it off. Those that need more than there is room for are left
    out, unless all do. Only what has all phrases finishes; where nothing has, the least incomplete texts are found.
    """

    phrases: Phrases = field(kw_only=True)
    end_ids: tuple[int, ...] = field(kw_only=True)
    incomplete: list[Beam] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.beams = [Beam(progress=self.phrases.start)]

    def need(self, beam: Beam) -> int:
        """How many tokens a text needs at least to be complete."""
        assert beam.progress is not None
        return self.phrases.need(beam.progress)

    def wanted(self, beam: Beam) -> set[int]:
        """Tokens that bring it nearer to being complete, or end it."""
        assert beam.progress is not None
        return self.phrases.nearer(beam.progress) if self.need(beam) else set(self.end_ids)

    def complete(self, beam: Beam) -> bool:
        """Whether a text holds all that must appear."""
        return self.need(beam) == 0

    def found(self) -> list[Beam]:
        """The complete texts, the best first; if there are none, the others, those that need least first."""
        return self.finished or self.incomplete

    def child(self, candidate: Candidate) -> Beam:
        """The text that a candidate stands for, and what it has of the phrases."""
        child = super().child(candidate)
        progress = self.beams[candidate.beam].progress
        assert progress is not None
        return replace(child, progress=self.phrases.after(progress, candidate.token))

    def advance(self, candidates: Sequence[Candidate]) -> None:
        """Go on to the next length, bank by bank."""
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
