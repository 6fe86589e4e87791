"""A tokenizer: the 128 ASCII characters and <|endoftext|>."""

import numpy as np

import minigpt
from minigpt.tokenizer.base import END_OF_TEXT, Tokenizer


@minigpt.register("tokenizer", "ascii", help="128 characters and <|endoftext|>")
class Ascii(Tokenizer):
    def __init__(self, *, unknown: str = "?"):
        self.kind, self.vocab_size, self.eot, self.cut, self.unknown = "ascii", 129, 128, None, unknown
        self.specials, self.pieces = {END_OF_TEXT: 128}, [*(bytes([i]) for i in range(128)), END_OF_TEXT.encode()]

    def encode_batch(self, texts):  # -> one array of uint32 per text
        return [np.array([ord(c if c.isascii() else self.unknown) for c in text], np.uint32) for text in texts]

    def to_dict(self):
        return {"kind": self.kind, "unknown": self.unknown}

    @classmethod
    def from_dict(cls, description):
        return cls(unknown=description["unknown"])
