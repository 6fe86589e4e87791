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
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minigpt.durable import sha256_of
from minigpt.errors import DataError

if TYPE_CHECKING:
    from minigpt.tokenizer.config import TokenizerConfig

END_OF_TEXT = "<|endoftext|>"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(ABC):
    """Base class of tokenizers. Subclasses set the attributes below and implement encoding; decoding is shared.

    Objects of other classes work too if they have encode, decode and vocab_size; see `given.as_tokenizer`.

    Attributes:
        kind: name of the kind, as in `TokenizerConfig.kind`.
        vocab_size: ids are 0 .. vocab_size-1, including special tokens; some ids of a published vocabulary are unused.
        eot: id of the end-of-text token, or None.
        prefix_ids: ids that precede every text, such as a beginning-of-text token; see `prompt_ids`.
        cut: zero-width pattern that matches where a document can be cut without changing its ids; None if no such place
            is known.
        pieces: bytes of each id: the text of special tokens, b"" for unused ids.
        specials: text of each special token -> its id. Inside a document the same text is ordinary text, but
            `encode_special` reads it as the token.
        learns: what a vocabulary is taken from: "train" (the training text), "all" (the whole text) or "" (no text).
        spaces_apart: whether a space is always a token of its own, so that a word has one spelling.
        verbatim: whether the bytes of a text's ids (`token_bytes`) equal the bytes of the text. A tokenizer.json may
            add a leading space or normalize the text.
    """

    kind: str
    vocab_size: int
    eot: int | None
    prefix_ids: tuple[int, ...] = ()
    cut: re.Pattern[str] | None
    pieces: list[bytes]
    specials: dict[str, int]
    verbatim: bool = True
    learns: ClassVar[str] = ""
    spaces_apart: ClassVar[bool] = False

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Callable[[], Iterable[str]] | None, show: bool) -> Tokenizer:
        """Create the tokenizer for a config: cls(**settings), or cls.from_texts(texts, **settings) if it learns.

        Args:
            config: its `own()` are the settings of a plug-in's tokenizer.
            texts: returns a new iterator over pieces of the corpus; None unless the class `learns`.
            show: whether to show progress and notices.
        """
        if texts is None:
            return cls(**config.own())
        return cls.from_texts(texts(), **config.own())

    @classmethod
    def from_texts(cls, texts: Iterable[str], **settings: Any) -> Tokenizer:
        """Take the vocabulary from texts; for classes that learn."""
        raise NotImplementedError(f"{cls.__name__}.from_texts")

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> Tokenizer:
        """Rebuild a tokenizer from the output of `to_dict`."""
        raise NotImplementedError(f"{cls.__name__}.from_dict")

    @classmethod
    def asked(cls, config: TokenizerConfig) -> dict[str, Any]:
        """What of a config decides about the ids, besides the kind; identifies a prepared corpus."""
        own = config.own()
        return {"settings": own} if own else {}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts to ids, one 1-D uint32 array per text. Lone surrogates are encoded as U+FFFD."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return a self-contained JSON description, from which `from_dict` rebuilds the tokenizer offline."""

    def encode(self, text: str) -> list[int]:
        """Encode one text to ids. Special tokens inside it are ordinary text."""
        return self.encode_batch([text])[0].tolist()

    def encode_special(self, text: str) -> list[int]:
        """Encode one text to ids; special tokens inside it become their ids."""
        texts = sorted(filter(None, self.specials), key=len, reverse=True)
        if not texts:
            return self.encode(text)
        parts = re.split(f"({'|'.join(map(re.escape, texts))})", text)
        ids = [[self.specials[part]] if i % 2 else self.encode(part) for i, part in enumerate(parts) if part]
        return [id for part in ids for id in part]

    def prompt_ids(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Encode a text as the start of a model's input: `prefix_ids`, then the ids of the text.

        Args:
            text: the text.
            add_special_tokens: whether `prefix_ids` come first.
            parse_special: whether special tokens in the text become their ids; see `encode_special`.
        """
        ids = self.encode_special(text) if parse_special else self.encode(text)
        return [*self.prefix_ids, *ids] if add_special_tokens else ids

    @property
    def given_ids(self) -> list[int]:
        """Ids that no model has to predict: `prefix_ids` without the end-of-text token."""
        return [id for id in self.prefix_ids if id != self.eot]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes, special tokens to their text. Raises DataError for an id outside the vocabulary."""
        ids = self._checked(ids)
        return b"".join([self._opening(i) for i in ids[:1]] + [self.pieces[i] for i in ids[1:]])

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """Create a decoder for ids that arrive one at a time."""
        return ByteStreamDecoder(self)

    def token_bytes(self) -> list[bytes]:
        """Bytes of text of each id; b"" for special tokens and unused ids."""
        special = set(self.specials.values())
        return [b"" if i in special else piece for i, piece in enumerate(self.pieces)]

    @cached_property
    def hash(self) -> str:
        """Sha256 (hex) of the canonical JSON of `to_dict`; equal hashes mean equal ids for every text."""
        return sha256_of(self.to_dict())

    def _opening(self, id: int) -> bytes:
        """Bytes of an id at the start of a text; some vocabularies drop a leading space there."""
        return self.pieces[id]

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for extreme in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= extreme < self.vocab_size:
                raise DataError(
                    f"token id {extreme} is not in the {self.kind} vocabulary (0 .. {self.vocab_size - 1}); decode "
                    "with the tokenizer that produced the ids, or mask a model's padded ids while sampling"
                )
        return ids

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, vocab_size={self.vocab_size}, eot={self.eot})"


class StreamDecoder(ABC):
    """Decodes ids one at a time. The concatenated results of `push` and `flush` equal `decode` of all ids."""

    @abstractmethod
    def push(self, id: int) -> str:
        """Add an id; return the characters that it completes, '' if there are none."""

    @abstractmethod
    def flush(self) -> str:
        """Return the remaining text after the last id (U+FFFD for an incomplete character), and reset the decoder."""


class ByteStreamDecoder(StreamDecoder):
    """For tokenizers whose ids always decode to the same bytes, except possibly at the start of a text."""

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
    """For decoders that depend on neighbouring tokens: the difference of decoding with and without the new ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.shown: list[int] = []  # the last ids whose text was returned
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
    """Replace lone surrogates by U+FFFD. Python strings can contain them, but UTF-8 cannot represent them."""
    try:
        text.encode("utf-8")  # much faster than a regex search, and nearly always sufficient
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text
