"""Phrases that a search must generate: progress of a text, and tokens that advance it.

The phrases form an automaton (Aho and Corasick, 1975). Its state is the longest suffix of the text that is a prefix of
a phrase. So after a mismatch, the part that still matches is kept, and phrases may overlap.

>>> phrases = Phrases([[[5, 5, 6]], [[6, 1], [6, 2]]])
>>> progress = phrases.start
>>> for token in (5, 5, 5, 6):
...     progress = phrases.after(progress, token)
>>> progress, phrases.need(progress), phrases.nearer(progress)
(Progress(begun=(5, 5, 6), met=frozenset({0})), 1, {1, 2})
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minigpt.errors import ConfigError
from minigpt.sampling.settings.rules import is_id

_EXACT = 5  # up to this many constraints, every order of meeting them is tried
_WAYS = 24  # ... if there are at most this many alternatives

Constraint = Sequence[Sequence[int]]  # alternative phrases, each a sequence of token ids


class Progress(NamedTuple):
    """A text's progress towards the constraints."""

    begun: tuple[int, ...] = ()
    """The longest suffix of the text that is a prefix of a phrase."""
    met: frozenset[int] = frozenset()
    """Indices of the constraints that are met."""


class Phrases:
    """The constraints of one prompt.

    Args:
        constraints: each a list of alternative phrases, one of which must appear; a phrase is a list of token ids.

    Raises:
        ConfigError: a constraint without alternatives, a phrase without tokens, or an invalid token id.
    """

    start = Progress()

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        for number, alternatives in enumerate(constraints):
            if not alternatives or not all(phrase and all(map(is_id, phrase)) for phrase in alternatives):
                raise ConfigError(
                    f"sampling: constraint {number} is {alternatives!r}; expected a list of alternatives, each a "
                    "non-empty list of token ids"
                )
        self.constraints = [tuple(tuple(map(int, phrase)) for phrase in one) for one in constraints]
        self.phrases = {phrase for alternatives in self.constraints for phrase in alternatives}
        self._shortest = [min(map(len, alternatives)) for alternatives in self.constraints]
        self._prefixes = {phrase[:n] for phrase in self.phrases for n in range(len(phrase) + 1)}
        self._met_by = {
            prefix: frozenset(
                number
                for number, alternatives in enumerate(self.constraints)
                if any(prefix[-len(phrase) :] == phrase for phrase in alternatives)
            )
            for prefix in self._prefixes
        }
        self._needs: dict[Progress, int] = {}

    def after(self, progress: Progress, token: int) -> Progress:
        """The progress after one more token."""
        begun = (*progress.begun, token)
        while begun not in self._prefixes:
            begun = begun[1:]  # ends at (), a prefix of every phrase
        return Progress(begun, progress.met | self._met_by[begun])

    def need(self, progress: Progress) -> int:
        """Minimum number of further tokens that meet all constraints; with many constraints, an upper bound.

        There is always a next token that reduces it.
        """
        if progress not in self._needs:
            self._needs[progress] = self._shortest_way(progress)
        return self._needs[progress]

    def nearer(self, progress: Progress) -> set[int]:
        """The tokens that reduce `need`."""
        tokens = {rest[0] for _, rest in self._ways(progress)}
        return {token for token in tokens if self.need(self.after(progress, token)) < self.need(progress)}

    def _shortest_way(self, progress: Progress) -> int:
        """Minimum, over the phrase to complete first, of its remaining tokens plus the need after it."""
        ways = list(self._ways(progress))
        if not ways:
            return 0
        unmet = [number for number in range(len(self.constraints)) if number not in progress.met]
        if len(unmet) <= _EXACT and len(ways) <= _WAYS:
            return min(len(rest) + self.need(self._along(progress, rest)) for _, rest in ways)
        others = sum(self._shortest[number] for number in unmet)
        return min(len(rest) + others - self._shortest[number] for number, rest in ways)

    def _ways(self, progress: Progress) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield (constraint index, remaining tokens after `progress.begun`) per phrase of each unmet constraint."""
        begun = progress.begun
        for number, alternatives in enumerate(self.constraints):
            for phrase in alternatives if number not in progress.met else ():
                had = next(
                    n for n in range(min(len(begun), len(phrase)), -1, -1) if begun[len(begun) - n :] == phrase[:n]
                )
                yield number, phrase[had:]

    def _along(self, progress: Progress, tokens: tuple[int, ...]) -> Progress:
        for token in tokens:
            progress = self.after(progress, token)
        return progress


def required(
    constraints: Sequence[Sequence[Constraint]], most: Sequence[int], end_ids: tuple[int, ...], vocab_size: int
) -> list[Phrases]:
    """Check the constraints of all prompts and return them as `Phrases`.

    Args:
        constraints: one list of constraints per prompt.
        most: maximum number of tokens to generate, per prompt.
        end_ids: tokens that end a text.
        vocab_size: vocabulary size of the model.

    Raises:
        ConfigError: the number of lists differs from the number of prompts, or a constraint cannot be met.
    """
    if len(constraints) != len(most):
        raise ConfigError(
            f"sampling: there are constraints for {len(constraints)} prompts; expected one list for each of {len(most)}"
        )
    several = [Phrases(own) for own in constraints]
    for number, (phrases, room) in enumerate(zip(several, most, strict=True)):
        for phrase in phrases.phrases:
            if max(phrase) >= vocab_size or not set(end_ids).isdisjoint(phrase[:-1]):
                raise ConfigError(
                    f"sampling: a constraint of prompt {number} has the phrase {list(phrase)}; expected ids below the "
                    f"vocabulary size of {vocab_size}, and an end token ({list(end_ids)}) only at its end"
                )
        if phrases.need(phrases.start) > room:
            raise ConfigError(
                f"sampling: the constraints of prompt {number} need {phrases.need(phrases.start)} tokens, but "
                f"max_new_tokens is {room}; raise max_new_tokens"
            )
    return several
