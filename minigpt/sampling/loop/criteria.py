"""Stopping criteria besides length and end tokens: token sequences, a time limit, repetition.

Each is a `Criterion`: called after every token with the context that holds it, it gives a reason for each row that is
to end. None remembers anything of a row, so rows may be moved, copied and dropped between two calls. What ended a row
belongs to it: the ids and the text keep a stop sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt.errors import ConfigError
from minigpt.sampling.processors.processors import Context
from minigpt.sampling.settings.rules import COUNT, FUNCTION, POSITIVE, Rule, check, is_id, is_whole

SEQUENCES = Rule(
    lambda v: isinstance(v, tuple) and bool(v) and all(isinstance(s, tuple) and s and all(map(is_id, s)) for s in v),
    "a list of lists of token ids, such as [[5, 6]], none of them empty",
)
TIMES = Rule(lambda v: is_whole(v) and v >= 2, "a whole number, 2 or more")


@dataclass(frozen=True)
class StopSequences:
    """End a row with "stop" where its written tokens end with one of these sequences.

    The prompt does not count: a sequence that begins in it is not found. Tokens may stand for the same text in several
    ways; where the text is meant, use `SamplingConfig.stop`.
    """

    sequences: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", _tuples(self.sequences))
        check(self, sequences=SEQUENCES)

    def __call__(self, context: Context) -> list[str | None]:
        """The reason "stop" for the rows that end with a sequence."""
        stops, sizes = set(self.sequences), set(map(len, self.sequences))
        tails = _tails(context, max(sizes))
        return ["stop" if any(tuple(tail[-size:]) in stops for size in sizes) else None for tail in tails]


@dataclass(frozen=True)
class MaxTime:
    """End every row with "time" at its first token after `seconds`, counted from when this object was made.

    So a fresh one is needed for each call. A row is never cut short of a token: one step of the model, and reading the
    prompt, can take longer than the limit.
    """

    seconds: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    """Tells the time in seconds from any origin, never going back."""
    began: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self, seconds=POSITIVE, clock=FUNCTION)
        object.__setattr__(self, "began", self.clock())

    def __call__(self, context: Context) -> list[str | None]:
        """The reason "time" for every row once the time is over."""
        over = self.clock() - self.began >= self.seconds
        return ["time" if over else None] * len(context.rows)


@dataclass(frozen=True)
class Repeats:
    """End a row with "repetition" where its written tokens end with one piece `times` times in a row.

    The piece has `shortest` to `longest` tokens. With times 3, the tokens 7 1 2 1 2 1 2 end so, 1 2 being the piece. A
    run of equal tokens is a repetition too; a `shortest` above 1 does not rule it out, it asks for a longer run. The
    limits are those of vLLM's repetition detection (min_count, max_pattern_size, min_pattern_size).
    """

    times: int
    longest: int = 32
    shortest: int = 1

    def __post_init__(self) -> None:
        check(self, times=TIMES, longest=COUNT, shortest=COUNT)
        for name in ("times", "longest", "shortest"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.shortest > self.longest:
            raise ConfigError(
                f"sampling: Repeats' shortest is {self.shortest}; expected at most its longest, {self.longest}"
            )

    def __call__(self, context: Context) -> list[str | None]:
        """The reason "repetition" for the rows that end so."""
        return ["repetition" if self._repeats(tail) else None for tail in _tails(context, self.times * self.longest)]

    def _repeats(self, tokens: list[int]) -> bool:
        newest = tokens[::-1]
        for size, token in enumerate(newest[self.shortest : len(tokens) // self.times + 1], self.shortest):
            # The newest times * size tokens have this period if they equal themselves moved by it.
            span = self.times * size
            if token == newest[0] and newest[size:span] == newest[: span - size]:
                return True
        return False


def _tails(context: Context, length: int) -> list[list[int]]:
    """The last written tokens of each row: `length` of them, or all where fewer were written."""
    begin = max(0, int(context.positions.min()) - length)  # what no row needs stays where the model is
    ids = context.ids[:, begin:].cpu().numpy()
    places = zip(ids, context.prompt_lengths.tolist(), context.positions.tolist(), strict=True)
    return [row[max(prompt, n - length) - begin : n - begin].tolist() for row, prompt, n in places]


def _tuples(value: Any) -> Any:
    """Sequences, arrays and tensors, nested, as tuples; anything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        return tuple(map(_tuples, value))
    return value
