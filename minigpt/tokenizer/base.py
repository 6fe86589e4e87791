"""The tokenizer protocol: text -> ids -> bytes -> text, and a description to rebuild the tokenizer from.

An id stands for bytes, not for characters: a character may be spread over several ids, and ids that a model chose may
join to bytes that are no text at all. So decoding is always ids -> bytes -> text, in one go (`decode`) or as the ids
come (`stream_decoder`), and whatever is not UTF-8 becomes U+FFFD.

    tokenizer.encode("hé")         [104, 195, 169]     (kind byte)
    tokenizer.decode([104, 195])   'h\\ufffd'
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from minigpt.durable import sha256_of
from minigpt.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(ABC):
    """Text <-> ids. Subclasses set the attributes below and say how to encode; decoding is the same for all.

    A caller's own object need not be one: with encode, decode and vocab_size it is taken, see `given.as_tokenizer`.

    Attributes:
        kind: the name of the kind, as in `TokenizerConfig.kind`.
        vocab_size: ids are 0 .. vocab_size-1, special tokens included; a published vocabulary may leave some unused.
        eot: id of the token that ends a document, or None where there is none.
        prefix_ids: what is put in front of a text that a model reads, such as a begin-of-text token; see `prompt_ids`.
        cut: matches (zero-width) where a document may be cut so that the ids of the pieces, joined, are the ids of
            the whole; None where no such place is known.
        pieces: the bytes of each id, special tokens as their text, unused ids as b"".
        specials: text of each special token -> its id. That text inside a document is ordinary text.
        verbatim: whether the bytes of a text's ids (`token_bytes`) are the bytes of the text itself. A tokenizer.json
            may put a space in front, or change the text before it is cut.
    """

    kind: str
    vocab_size: int
    eot: int | None
    prefix_ids: tuple[int, ...] = ()
    cut: re.Pattern[str] | None
    pieces: list[bytes]
    specials: dict[str, int]
    verbatim: bool = True

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, 1-D uint32. A lone surrogate, which is no character, is encoded as U+FFFD."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, complete by itself: `from_dict` makes the same tokenizer of it, offline."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Special tokens inside it are ordinary text."""
        return self.encode_batch([text])[0].tolist()

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text as a model reads it from its beginning: `prefix_ids`, then the text's own."""
        return [*self.prefix_ids, *self.encode(text)]

    @property
    def given_ids(self) -> list[int]:
        """The ids that each text is given, and no model has to predict: of `prefix_ids` all but the end-of-text."""
        return [id for id in self.prefix_ids if id != self.eot]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for, special tokens as their text. An id outside the vocabulary is a DataError."""
        ids = self._checked(ids)
        return b"".join([self._opening(i) for i in ids[:1]] + [self.pieces[i] for i in ids[1:]])

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return ByteStreamDecoder(self)

    def token_bytes(self) -> list[bytes]:
        """The bytes of text each id stands for: b"" for special tokens and unused ids."""
        special = set(self.specials.values())
        return [b"" if i in special else piece for i, piece in enumerate(self.pieces)]

    @cached_property
    def hash(self) -> str:
        """Sha256 (hex) of the canonical JSON of `to_dict`: equal hashes, equal ids for every text."""
        return sha256_of(self.to_dict())

    def _opening(self, id: int) -> bytes:
        """The bytes of an id that opens a text; some vocabularies drop a space there."""
        return self.pieces[id]

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for extreme in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= extreme < self.vocab_size:
                raise DataError(
                    f"token id {extreme} is not in the {self.kind} vocabulary, its ids are 0 .. {self.vocab_size - 1}; "
                    "decode with the tokenizer that made the ids, or mask a model's padded ids while sampling"
                )
        return ids

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, vocab_size={self.vocab_size}, eot={self.eot})"


class StreamDecoder(ABC):
    """Ids to text as they come. All that `push` and the last `flush` return, joined, is `decode` of all the ids."""

    @abstractmethod
    def push(self, id: int) -> str:
        """The characters that this id completes; '' while one is still incomplete."""

    @abstractmethod
    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for an incomplete character. The decoder is then as new."""


class ByteStreamDecoder(StreamDecoder):
    """For tokenizers whose ids stand for bytes wherever they are in a text, the first one perhaps excepted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = True

    def push(self, id: int) -> str:
        (id,) = self.tokenizer._checked([id])
        piece = self.tokenizer._opening(id) if self.at_start else self.tokenizer.pieces[id]
        self.at_start = False
        return self.utf8.decode(piece)

    def flush(self) -> str:
        self.at_start = True
        return self.utf8.decode(b"", final=True)


class TextStreamDecoder(StreamDecoder):
    """For decoders that look at a token's neighbour: what a token adds is the text with it less the text without it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.shown: list[int] = []  # the last ids whose text is out
        self.held: list[int] = []  # ids whose text may still change

    def push(self, id: int) -> str:
        self.held.append(id)
        text = self._added()
        if not text or text.endswith("\ufffd"):
            return ""
        self.shown, self.held = self.held, []
        return text

    def flush(self) -> str:
        text = self._added()
        self.shown, self.held = [], []
        return text

    def _added(self) -> str:
        return self.tokenizer.decode(self.shown + self.held)[len(self.tokenizer.decode(self.shown)) :]


def well_formed(text: str) -> str:
    """The text with U+FFFD for each surrogate: Python strings can hold them, UTF-8 and thus token ids cannot."""
    try:
        text.encode("utf-8")  # far quicker than a search, and nearly always enough
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text
