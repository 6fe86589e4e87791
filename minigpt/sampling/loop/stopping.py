"""Tokens -> text as it is generated, and stop strings: found, held back, cut off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from minigpt.sampling.processors.processors import Context

NOTHING: Mapping[int, str] = {}

Criterion = Callable[[Context], Sequence[str | None]]
"""A stopping criterion, called after each token: a finish reason for every row that ends, None for the others."""


class Reader(Protocol):
    """Reads the tokens of one row and returns its text piece by piece, once a piece is final."""

    def push(self, token: int) -> tuple[str, bool]:
        """New text, and whether the row ends here."""

    def flush(self) -> tuple[str, bool]:
        """The rest of the text after the last token, and whether a stop string was found in it."""


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    The result does not depend on how the text is split: the stop string that is completed first wins, and the longest
    of those completed at the same character. Text is held back only while it may be the start of a stop string.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("EN"), matcher.push("D of it")
    (('the ', False), ('E', False), ('', True))
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self.stop = tuple(stop)
        self.include_stop = include_stop
        self.held = ""  # the longest suffix of the text that is a prefix of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """New text that is final, and whether a stop string was completed."""
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
        """The text that was held back, after the last piece."""
        text, self.held = self.held, ""
        return text


class TextReader:
    """A `Reader` that wraps a tokenizer's stream decoder.

    Args:
        decoder: has push(id) -> str, which returns whole characters only, and flush() -> str.
        stop: strings that end the row; only the generated text is searched.
        include_stop: whether to keep the stop string in the text.
        hidden: tokens that are left out of the text, with their texts; one whose text contains a stop string still ends
            the row.
    """

    def __init__(
        self, decoder: Any, stop: Sequence[str] = (), include_stop: bool = False, hidden: Mapping[int, str] = NOTHING
    ) -> None:
        self.decoder, self.hidden = decoder, hidden
        self.matcher = StopMatcher(stop, include_stop)
        self.stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        """New text, and whether a stop string was completed."""
        if token in self.hidden:
            self.stopped = any(stop in self.hidden[token] for stop in self.matcher.stop)
            return self.matcher.flush() if self.stopped else "", self.stopped
        text, self.stopped = self.matcher.push(self.decoder.push(token))
        return text, self.stopped

    def flush(self) -> tuple[str, bool]:
        """Incomplete characters (as U+FFFD) and held-back text, and whether a stop string was completed at any time."""
        if self.stopped:
            return "", True
        text, self.stopped = self.matcher.push(self.decoder.flush())
        return text + self.matcher.flush(), self.stopped
