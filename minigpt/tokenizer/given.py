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
    """A `Tokenizer`: the object itself, one made of a transformers or `tokenizers` object, or a `GivenTokenizer`.

    Raises:
        ConfigError: the object lacks encode (text -> ids), decode (ids -> text) or vocab_size.
    """
    if isinstance(own, Tokenizer):
        return own
    engine = getattr(own, "backend_tokenizer", own)  # transformers' fast tokenizers have one
    if type(engine).__module__.partition(".")[0] == "tokenizers" and hasattr(engine, "to_str"):
        from minigpt.tokenizer.huggingface import from_engine

        return from_engine(engine, getattr(own, "eos_token_id", None))
    return GivenTokenizer(own)


class GivenTokenizer(Tokenizer):
    """Wraps a user's object. Attributes and methods of `Tokenizer` that the object has are used; defaults otherwise:

    kind is the class name. There are no end-of-text and special tokens. The bytes of a token are its decoded text, b""
    if decoding fails. Streaming decodes each id together with the previous ones. Without to_dict, the tokenizer cannot
    be saved in a checkpoint.
    """

    def __init__(self, own: Any) -> None:
        missing = [name for name in NEEDED if not hasattr(own, name)]
        if missing:
            raise ConfigError(
                f"tokenizer: {type(own).__name__} has no {', '.join(missing)}; it needs at least {', '.join(NEEDED)}"
            )
        self.own = own
        self.kind = getattr(own, "kind", type(own).__name__)
        try:
            size = own.vocab_size() if callable(own.vocab_size) else own.vocab_size
            self.vocab_size = max(
                int(size), len(own) if hasattr(own, "__len__") else 0
            )  # len() may include added tokens
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
        if name == "own":  # during copying, before attributes are set
            raise AttributeError(name)
        return getattr(self.own, name)

    @cached_property
    def pieces(self) -> list[bytes]:  # type: ignore[override]
        """Bytes of each id."""
        return (
            list(self.own.pieces) if hasattr(self.own, "pieces") else [self._piece(i) for i in range(self.vocab_size)]
        )

    def _piece(self, id: int) -> bytes:
        try:
            return self.own.decode([id]).encode("utf-8", "replace")
        except Exception:  # an unused id
            return b""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def encode(self, text: str) -> list[int]:
        """Encode one text to ids. Raises DataError if the wrapped tokenizer fails."""
        try:
            return [int(id) for id in self.own.encode(text)]
        except (LookupError, ValueError, TypeError) as error:
            raise DataError(f"the tokenizer {self.kind} cannot encode {text[:40]!r} ({error!r})") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text."""
        return self.own.decode(self._checked(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to text and encode it as UTF-8."""
        return self.decode(ids).encode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """Create a decoder for ids that arrive one at a time."""
        return self.own.stream_decoder() if hasattr(self.own, "stream_decoder") else TextStreamDecoder(self)

    def token_bytes(self) -> list[bytes]:
        """Bytes of text of each id; b"" for special tokens, the end-of-text token and unused ids."""
        if hasattr(self.own, "token_bytes"):
            return self.own.token_bytes()
        special = {*self.specials.values(), self.eot}
        return [b"" if i in special else piece for i, piece in enumerate(self.pieces)]

    def to_dict(self) -> dict[str, Any]:
        """Call `to_dict` of the wrapped object. Raises ConfigError if it has none."""
        if hasattr(self.own, "to_dict"):
            return self.own.to_dict()
        raise ConfigError(
            f"tokenizer: {self.kind} has no to_dict, so it cannot be saved; use one of minigpt's tokenizers to save"
        )
