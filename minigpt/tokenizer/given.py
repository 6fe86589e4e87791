"""A user's tokenizer object: it needs encode, decode and vocab_size; the rest has defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from minigpt.errors import ConfigError, DataError
from minigpt.tokenizer.base import StreamDecoder, TextStreamDecoder, Tokenizer

NEEDED = ("encode", "decode", "vocab_size")


def as_tokenizer(own: Any) -> Tokenizer:
    """The tokenizer itself if it is one of ours, else a `GivenTokenizer` of it.

    Raises:
        ConfigError: it lacks encode (text -> ids), decode (ids -> text) or vocab_size.
    """
    return own if isinstance(own, Tokenizer) else GivenTokenizer(own)


class GivenTokenizer(Tokenizer):
    """Whatever the caller's object has of the protocol is used. Where it has not:

    kind is its class's name, there is no end-of-text and there are no special tokens, a token's bytes are those of
    what it decodes to alone (b"" for an id that it cannot decode), and ids that come one at a time are decoded again
    with those before them. It cannot be stored in a checkpoint.
    """

    def __init__(self, own: Any) -> None:
        missing = [name for name in NEEDED if not hasattr(own, name)]
        if missing:
            raise ConfigError(
                f"tokenizer: {type(own).__name__} has no {', '.join(missing)}; expected {', '.join(NEEDED)} at least"
            )
        self.own = own
        self.kind = getattr(own, "kind", type(own).__name__)
        try:
            size = own.vocab_size() if callable(own.vocab_size) else own.vocab_size
            self.vocab_size = max(int(size), len(own) if hasattr(own, "__len__") else 0)  # added tokens beyond it
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"tokenizer: vocab_size of {self.kind} is {own.vocab_size!r}; expected a number"
            ) from error
        self.prefix_ids = tuple(int(id) for id in getattr(own, "prefix_ids", ()))
        self.eot = getattr(own, "eot", None)
        self.cut = getattr(own, "cut", None)
        self.specials = dict(getattr(own, "specials", None) or {})
        self.verbatim = getattr(own, "verbatim", False)

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.own, name)

    @cached_property
    def pieces(self) -> list[bytes]:  # type: ignore[override]
        """The bytes of each id."""
        return (
            list(self.own.pieces) if hasattr(self.own, "pieces") else [self._piece(i) for i in range(self.vocab_size)]
        )

    def _piece(self, id: int) -> bytes:
        try:
            return self.own.decode([id]).encode("utf-8", "replace")
        except Exception:  # an id that its vocabulary leaves unused
            return b""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Raises DataError where the caller's tokenizer raises what is no error of ours."""
        try:
            return [int(id) for id in self.own.encode(text)]
        except (LookupError, ValueError, TypeError) as error:
            raise DataError(f"the tokenizer {self.kind} cannot encode {text[:40]!r} ({error!r})") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for."""
        return self.own.decode(self._checked(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the text that ids stand for."""
        return self.decode(ids).encode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return self.own.stream_decoder() if hasattr(self.own, "stream_decoder") else TextStreamDecoder(self)

    def token_bytes(self) -> list[bytes]:
        """The bytes of text each id stands for: b"" for special tokens, the end-of-text and unused ids."""
        if hasattr(self.own, "token_bytes"):
            return self.own.token_bytes()
        special = {*self.specials.values(), self.eot}
        return [b"" if i in special else piece for i, piece in enumerate(self.pieces)]

    def to_dict(self) -> dict[str, Any]:
        """The caller's description. Raises ConfigError where it has none."""
        if hasattr(self.own, "to_dict"):
            return self.own.to_dict()
        raise ConfigError(
            f"tokenizer: {self.kind} has no to_dict, so that it cannot be stored; save with one of minigpt's tokenizers"
        )
