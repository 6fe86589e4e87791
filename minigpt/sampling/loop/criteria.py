"""Stopping criteria besides length and end tokens: token sequences, a time limit, repetition.

Each is a `Criterion`: it is called after every token, with a context that includes the token, and returns a reason for
each row that ends. Criteria have no per-row state, so rows can be reordered, copied and dropped between two calls. A
stop sequence is kept in the ids and text of the row that it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt.errors import ConfigError
from minigpt.sampling.loop.stopping import Criterion
from minigpt.sampling.processors.processors import Context
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.settings.rules import COUNT, FUNCTION, POSITIVE, Rule, check, is_id, is_whole

SEQUENCES = Rule(
    lambda v: isinstance(v, tuple) and bool(v) and all(isinstance(s, tuple) and s and all(map(is_id, s)) for s in v),
    "a list of lists of token ids, such as [[5, 6]], none of them empty",
)
TIMES = Rule(lambda v: is_whole(v) and v >= 2, "a whole number, 2 or more")


@dataclass(frozen=True)
class StopSequences:
    """End a row with the reason "stop" when its generated tokens end with one of these sequences.

    The prompt is not searched: a sequence that begins in it does not count. Different token sequences can encode the
    same text; to stop at a text, use `SamplingConfig.stop`.
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
    """End every row with the reason "time" at its first token after `seconds`, counted from this object's creation.

    Create a new object for each call. Time is checked only after each token, so reading the prompt or one step of the
    model can exceed the limit.
    """

    seconds: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    """A monotonic clock in seconds."""
    began: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self, seconds=POSITIVE, clock=FUNCTION)
        object.__setattr__(self, "began", self.clock())

    def __call__(self, context: Context) -> list[str | None]:
        """The reason "time" for every row once the limit has passed."""
        over = self.clock() - self.began >= self.seconds
        return ["time" if over else None] * len(context.rows)


@dataclass(frozen=True)
class Repeats:
    """End a row with the reason "repetition" when its generated tokens end with a sequence repeated `times` times.

    The sequence has `shortest` to `longest` tokens. Example with times 3: 7 1 2 1 2 1 2 ends with the sequence 1 2. A
    run of equal tokens is a repetition too; with `shortest` above 1, the run must be longer. The parameters correspond
    to those of vLLM's repetition detection (min_count, max_pattern_size, min_pattern_size).
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
        """The reason "repetition" for the rows that end with a repetition."""
        return ["repetition" if self._repeats(tail) else None for tail in _tails(context, self.times * self.longest)]

    def _repeats(self, tokens: list[int]) -> bool:
        newest = tokens[::-1]
        for size, token in enumerate(newest[self.shortest : len(tokens) // self.times + 1], self.shortest):
            # The newest times * size tokens have period `size` if they equal themselves shifted by `size`.
            span = self.times * size
            if token == newest[0] and newest[size:span] == newest[: span - size]:
                return True
        return False


def _tails(context: Context, length: int) -> list[list[int]]:
    """The last `length` generated tokens of each row, or all of them if there are fewer."""
    begin = max(0, int(context.positions.min()) - length)  # do not transfer tokens that no row needs
    ids = context.ids[:, begin:].cpu().numpy()
    places = zip(ids, context.prompt_lengths.tolist(), context.positions.tolist(), strict=True)
    return [row[max(prompt, n - length) - begin : n - begin].tolist() for row, prompt, n in places]


def _tuples(value: Any) -> Any:
    """Convert nested sequences, arrays and tensors to tuples; return anything else unchanged."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        return tuple(map(_tuples, value))
    return value


def criteria_of(config: SamplingConfig) -> list[Criterion]:
    """The criteria that the settings ask for."""
    criteria: list[Criterion] = []
    if config.stop_sequences:
        criteria.append(StopSequences(config.stop_sequences))
    if config.repetition_stop is not None:
        criteria.append(Repeats(config.repetition_stop, config.repetition_stop_length))
    if config.max_time is not None:
        criteria.append(MaxTime(config.max_time))
    return criteria
