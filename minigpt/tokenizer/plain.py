"""Byte and character vocabularies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from minigpt.errors import DataError
from minigpt.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed
from minigpt.tokenizer.config import TokenizerConfig

ANYWHERE = re.compile("")


class ByteTokenizer(Tokenizer):
    """Ids 0 .. 255 are the UTF-8 bytes, 256 is <|endoftext|>. Needs no training and encodes any text."""

    spaces_apart = True

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
        """Rebuild a tokenizer from the output of `to_dict`."""
        return cls()


class CharTokenizer(Tokenizer):
    """One id per character of the corpus, in code-point order, as nanoGPT's `sorted(set(text))`. No special tokens.

    Args:
        characters: the vocabulary, in any order; duplicates are ignored.
        unknown: handling of other characters in `encode`: "error" raises DataError, "drop" skips them.
    """

    learns = "all"  # so that validation can be encoded
    spaces_apart = True

    def __init__(self, characters: Iterable[str], unknown: str = "error") -> None:
        self.characters = sorted({well_formed(character) for character in characters})
        if not self.characters:
            raise DataError("the corpus is empty; tokenizer kind 'char' takes its vocabulary from it: give a text")
        self.unknown = unknown
        self.kind = "char"
        self.vocab_size = len(self.characters)
        self.eot = None
        self.cut = ANYWHERE
        self.specials = {}
        self.pieces = [character.encode("utf-8") for character in self.characters]
        codes = np.array([ord(character) for character in self.characters])
        # Code point -> id, -1 for unknown; one extra entry at the end covers all larger code points.
        self._ids = np.full(codes[-1] + 2, -1, np.int32)
        self._ids[codes] = np.arange(self.vocab_size)

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Callable[[], Iterable[str]] | None, show: bool) -> Tokenizer:
        """Create the tokenizer of all characters in the corpus."""
        assert texts is not None
        return cls.from_texts(texts(), config.unknown)

    @classmethod
    def asked(cls, config: TokenizerConfig) -> dict[str, Any]:
        """The handling of unknown characters."""
        return {"unknown": config.unknown}

    @classmethod
    def from_texts(cls, texts: Iterable[str], unknown: str = "error") -> CharTokenizer:  # type: ignore[override]
        """Create a tokenizer from all characters in some texts."""
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
                    "contains it, or skip unknown characters with --tokenizer.unknown drop"
                )
            ids = ids[known]
        return ids.astype(np.uint32)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": "".join(self.characters), "unknown": self.unknown}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> CharTokenizer:
        """Rebuild a tokenizer from the output of `to_dict`."""
        return cls(description["characters"], description["unknown"])
