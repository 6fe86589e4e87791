"""Tokens -> text as it is generated, and stop strings: found, held back, cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from minigpt.sampling.processors.processors import Context

Criterion = Callable[[Context], Sequence[str | None]]
"""A user's own ending: after each token, a reason for every row that is to end here, None for the others."""


class Reader(Protocol):
    """Reads the tokens of one row and tells its text as it becomes certain."""

    def push(self, token: int) -> tuple[str, bool]:
        """Further text, and whether the row ends here."""

    def flush(self) -> tuple[str, bool]:
        """The rest of the text when no token follows, and whether an ending was found in it."""


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces.

    The answer is that of reading character by character, however the text is cut: the string that is complete first
    wins, and the longest of those complete at the same character. Text is held back only while it may be the beginning
    of a stop string.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("EN"), matcher.push("D of it")
    (('the ', False), ('E', False), ('', True))
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self.stop = tuple(stop)
        self.include_stop = include_stop
        self.held = ""  # the longest end of the text that begins a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain to belong to the result, and whether a stop string was completed."""
        text = self.held + text
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stop if stop in text]
        if found:
            end, minus_length = min(found)
            self.held = ""
            return text[: end if self.include_stop else end + minus_length], True
        keep = next((i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self.stop)), len(text))
        self.held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back, when no text follows."""
        text, self.held = self.held, ""
        return text


class TextReader:
    """A `Reader` over a tokenizer's stream decoder.

    Args:
        decoder: has push(id) -> str, whole characters only, and flush() -> str.
        stop: texts that end the row; they are looked for in what was written, not in the prompt.
        include_stop: whether the text keeps the stop string.
    """

    def __init__(self, decoder: Any, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self.decoder = decoder
        self.matcher = StopMatcher(stop, include_stop)
        self.stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """Further text, and whether a stop string was completed."""
        text, self.stopped = self.matcher.push(self.decoder.push(token))
        return text, self.stopped

    def flush(self) -> tuple[str, bool]:
        """Half characters (as U+FFFD) and what was held back, and whether a stop string was completed now or before."""
        if self.stopped:
            return "", True
        text, self.stopped = self.matcher.push(self.decoder.flush())
        return text + self.matcher.flush(), self.stopped
