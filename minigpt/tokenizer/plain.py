"""Byte and character vocabularies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minigpt.errors import DataError
from minigpt.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed

ANYWHERE = re.compile("")


class ByteTokenizer(Tokenizer):
    """Ids 0 .. 255 are the bytes of UTF-8, 256 is <|endoftext|>. Nothing to learn, no text it cannot spell."""

    def __init__(self) -> None:
        self.kind = "byte"
        self.vocab_size = 257
        self.eot = 256
        self.cut = ANYWHERE
        self.specials = {END_OF_TEXT: 256}
        self.pieces = [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(well_formed(text).encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> ByteTokenizer:
        """The tokenizer that `to_dict` described."""
        return cls()


class CharTokenizer(Tokenizer):
    """Every character of the corpus is an id, in code-point order, as nanoGPT's `sorted(set(text))`. No special tokens.

    Args:
        characters: the vocabulary; order and repetition do not matter.
        unknown: what a character outside it does in `encode`: "error" raises a DataError, "drop" leaves it out.
    """

    def __init__(self, characters: Iterable[str], unknown: str = "error") -> None:
        self.characters = sorted({well_formed(character) for character in characters})
        if not self.characters:
            raise DataError(
                "the corpus holds no characters; kind 'char' takes its vocabulary from them: give it some text"
            )
        self.unknown = unknown
        self.kind = "char"
        self.vocab_size = len(self.characters)
        self.eot = None
        self.cut = ANYWHERE
        self.specials = {}
        self.pieces = [character.encode("utf-8") for character in self.characters]
        codes = np.array([ord(character) for character in self.characters])
        # Code point -> id, -1 where there is none; one entry past the last character answers for all beyond it.
        self._ids = np.full(codes[-1] + 2, -1, np.int32)
        self._ids[codes] = np.arange(self.vocab_size)

    @classmethod
    def from_texts(cls, texts: Iterable[str], unknown: str = "error") -> CharTokenizer:
        """The tokenizer of all the characters in some texts."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(characters, unknown)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(well_formed(text)) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids.take(np.frombuffer(text.encode("utf-32-le"), np.uint32), mode="clip")
        known = ids >= 0
        if not known.all():
            if self.unknown == "error":
                position = int(known.argmin())
                character = text[position]
                raise DataError(
                    f"character {character!r} (U+{ord(character):04X}) at position {position} of the text is not in "
                    f"the vocabulary of {self.vocab_size} characters from the corpus; remove it, train on text that "
                    "holds it, or leave such characters out with --tokenizer.unknown drop"
                )
            ids = ids[known]
        return ids.astype(np.uint32)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": "".join(self.characters), "unknown": self.unknown}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> CharTokenizer:
        """The tokenizer that `to_dict` described."""
        return cls(description["characters"], description["unknown"])
