"""Byte-pair encoding (BPE), run by tiktoken.

A pattern splits the text. In each split, adjacent tokens are merged in the order of the merges learned in training. The
id of a token is its rank: lower ranks were merged earlier. Trained and published vocabularies have the same form: a
pattern, and the tokens in rank order.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken

from minigpt.tokenizer.alphabet import LINE_START
from minigpt.tokenizer.base import END_OF_TEXT, Tokenizer, well_formed
from minigpt.tokenizer.config import TokenizerConfig

# tiktoken's regex engine keeps a backtracking entry per whitespace character, and panics at a million.
MOST_BLANKS = 500_000
_BLANKS = re.compile(r"\s{64,}")


class BPETokenizer(Tokenizer):
    """A byte-level BPE vocabulary, run by tiktoken.

    Args:
        kind: "bpe" or the name of a published vocabulary.
        pattern: regular expression that splits the text before merging, in tiktoken's syntax.
        tokens: bytes of each token in rank order, including all 256 single bytes.
        specials: text -> id of the special tokens, including <|endoftext|>; ids may be beyond the last token.
    """

    learns = "train"

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Callable[[], Iterable[str]] | None, show: bool) -> Tokenizer:
        """Train merges on the training text."""
        from minigpt.tokenizer.train_bpe import SPLIT_PATTERN, train_bpe

        assert texts is not None
        tokens = train_bpe(texts(), config.vocab_size, show)
        return cls("bpe", SPLIT_PATTERN, tokens, {END_OF_TEXT: len(tokens)})

    @classmethod
    def asked(cls, config: TokenizerConfig) -> dict[str, Any]:
        """The size of the vocabulary."""
        return {"vocab_size": config.vocab_size}

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
        """Encode one text to ids. Special tokens inside it are ordinary text."""
        first, *others = _few_blanks(well_formed(text))
        ids = self._encoding.encode_ordinary(first)
        for portion in others:
            ids += self._encoding.encode_ordinary(portion)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts on all cores, one 1-D uint32 array each. Whitespace runs are split every 500,000 characters."""
        if len(texts) == 1:
            return [self._encode_to_array(texts[0])]
        with ThreadPoolExecutor(_cores()) as pool:
            return list(pool.map(self._encode_to_array, texts))

    def _encode_to_array(self, text: str) -> np.ndarray:
        # Via a list of ints: tiktoken's encode_to_numpy also searches for special tokens and is slower by a third.
        return np.array(self.encode(text), dtype=np.uint32)

    def to_dict(self) -> dict[str, Any]:
        tokens = " ".join(base64.b64encode(token).decode("ascii") for token in self.tokens)
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens, "specials": self.specials}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> BPETokenizer:
        """Rebuild a tokenizer from the output of `to_dict`."""
        tokens = [base64.b64decode(token) for token in description["tokens"].split(" ")]
        return cls(description["kind"], description["pattern"], tokens, description["specials"])


def _few_blanks(text: str) -> Iterator[str]:
    """Split a text so that no part has more than `MOST_BLANKS` consecutive whitespace characters."""
    start = 0
    if len(text) > MOST_BLANKS:
        for run in _BLANKS.finditer(text):
            for end in range(run.start() + MOST_BLANKS, run.end(), MOST_BLANKS):
                yield text[start:end]
                start = end
    yield text[start:]


def _cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
