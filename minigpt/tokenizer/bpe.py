"""Byte-pair encoding: text is split by a pattern, then in each split the neighbours that were merged first in training
are merged again, until none is left. A token's id is its rank: the lower, the earlier it was merged.

Trained and published vocabularies are the same thing here, a pattern and the tokens in rank order, and the same code
runs them: tiktoken's.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken

from minigpt.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed

# Every pattern here ends a split between a line's end and a letter, and none looks further back than the split's start
# or further ahead than one character, so a document can be cut there. Behind whitespace it cannot: blanks are split
# by what follows them.
LINE_START = re.compile(r"(?<=\S\n)(?=[^\W\d_])")

# tiktoken's pattern engine keeps a stack entry for each blank it may have to give back, and panics at a million.
MOST_BLANKS = 500_000
_BLANKS = re.compile(r"\s{64,}")


class BPETokenizer(Tokenizer):
    """A byte-level BPE vocabulary, run by tiktoken.

    Args:
        kind: "bpe" or the name of a published vocabulary.
        pattern: how text is split before merging, in the syntax that tiktoken reads.
        tokens: the bytes of each token in rank order; all 256 single bytes are among them.
        specials: text -> id of the special tokens, with <|endoftext|> among them; ids may lie beyond the last token's.
    """

    def __init__(self, kind: str, pattern: str, tokens: Sequence[bytes], specials: Mapping[str, int]) -> None:
        self.kind = kind
        self.pattern = pattern
        self.tokens = list(tokens)
        self.specials = dict(specials)
        self.vocab_size = max(len(self.tokens) - 1, *self.specials.values()) + 1
        self.eot = self.specials[END_OF_TEXT]
        self.cut = LINE_START
        self.pieces = self.tokens + [b""] * (self.vocab_size - len(self.tokens))
        for text, id in self.specials.items():
            self.pieces[id] = text.encode("utf-8")
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials)

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Special tokens inside it are ordinary text."""
        first, *others = _few_blanks(well_formed(text))
        ids = self._encoding.encode_ordinary(first)
        for portion in others:
            ids += self._encoding.encode_ordinary(portion)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, 1-D uint32, on all cores. A run of over 500,000 blanks is split at each 500,000."""
        if len(texts) == 1:
            return [self._encode_to_array(texts[0])]
        with ThreadPoolExecutor(_cores()) as pool:
            return list(pool.map(self._encode_to_array, texts))

    def _encode_to_array(self, text: str) -> np.ndarray:
        # Through a list of ints: tiktoken's own encode_to_numpy also looks for special tokens and is slower by a third.
        return np.array(self.encode(text), dtype=np.uint32)

    def to_dict(self) -> dict[str, Any]:
        tokens = " ".join(base64.b64encode(token).decode("ascii") for token in self.tokens)
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens, "specials": self.specials}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> BPETokenizer:
        """The tokenizer that `to_dict` described."""
        tokens = [base64.b64decode(token) for token in description["tokens"].split(" ")]
        return cls(description["kind"], description["pattern"], tokens, description["specials"])


def _few_blanks(text: str) -> Iterator[str]:
    """The text in portions without a run of more than `MOST_BLANKS` whitespace characters; nearly always the text."""
    start = 0
    if len(text) > MOST_BLANKS:
        for run in _BLANKS.finditer(text):
            for end in range(run.start() + MOST_BLANKS, run.end(), MOST_BLANKS):
                yield text[start:end]
                start = end
    yield text[start:]


def _cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _byte_characters() -> dict[str, int]:
    """The character -> byte map with which GPT-2's files (and Hugging Face's) spell bytes as printable text.

    Printable Latin-1 characters stand for themselves, the other bytes are U+0100, U+0101, ... in order: a space is 'Ġ'.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
