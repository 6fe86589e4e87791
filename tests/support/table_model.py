"""Toy models for tests of decoding: next-token logits that come only from the token ids that a cache holds.

The ids themselves are the "keys", so that a row gathered, truncated or padded wrongly gives other logits. Unwritten
slots hold an id of their own, and every way to misuse the cache is an error.
"""

from __future__ import annotations

import codecs
import math

import torch
from torch import Tensor, nn

from minigpt.sampling.loop.loop import stream_rows

UNWRITTEN = 99


def run(model, prompts, max_new_tokens=12, seeds=None, **options) -> dict[tuple[int, int], tuple[list[int], str]]:
    """(prompt, sample) -> (written tokens, why it ended)."""
    seeds = [100 + i for i in range(len(prompts))] if seeds is None else seeds
    rows: dict[tuple[int, int], tuple[list[int], str]] = {}
    for event in stream_rows(model, prompts, max_new_tokens=max_new_tokens, seeds=seeds, **options):
        tokens, reason = rows.get((event.prompt, event.sample), ([], None))
        assert reason is None, "nothing comes after the end"
        rows[event.prompt, event.sample] = (tokens + [event.token] * (event.token is not None), event.finish_reason)
    assert all(reason for _, reason in rows.values())
    return rows


class TableCache:
    def __init__(self, rows: int, capacity: int) -> None:
        self.keys = torch.full((rows, capacity), UNWRITTEN)
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def append(self, ids: Tensor, counts: Tensor) -> None:
        assert ids.shape[0] == counts.shape[0] == self.keys.shape[0], "one row of ids for each row of the cache"
        assert counts.min() >= 1, "nothing comes after no token"
        assert counts.max() <= ids.shape[1]
        assert self.longest + ids.shape[1] <= self.capacity, "the padding too needs room"
        for row, start in enumerate(self.lengths.tolist()):
            self.keys[row, start : start + ids.shape[1]] = ids[row]
        self.lengths = self.lengths + counts

    def truncate(self, lengths: Tensor) -> None:
        assert (lengths <= self.lengths).all()
        self.lengths = lengths.clone()

    def gather(self, rows: Tensor, start: int = 0) -> None:
        keys = self.keys[rows]
        if start:
            keys[:, :start] = self.keys[:, :start]
        self.keys, self.lengths = keys, self.lengths[rows]

    def grow(self, capacity: int) -> None:
        room = torch.full((len(self.keys), capacity - self.capacity), UNWRITTEN)
        self.keys = torch.cat((self.keys, room), dim=1)


class TableLM:
    """Logits are a fixed, irregular function of the last `order` tokens in view, or of all of them and their places.

    Args:
        order: 0, 1, 2, ..., or None for the whole window: then a window that starts elsewhere gives other logits.
        end_bias: added to token 0's logit, to make it likelier as an end.
    """

    def __init__(
        self,
        vocab_size: int = 6,
        max_context: int = 64,
        order: int | None = 2,
        scale: float = 2.0,
        end_bias: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocab_size, self.max_context, self.order = vocab_size, max_context, order
        self.scale, self.end_bias, self.dtype = scale, end_bias, dtype
        self.rows_read: list[int] = []  # rows of each call, for tests of what is computed

    def logits(self, window: list[int]) -> list[float]:
        """The logits after a window of tokens: plain Python, for oracles too."""
        state = 1
        for place, token in enumerate(window if self.order is None else window[len(window) - self.order :]):
            state = (state * 31 + (token + 1) * (place + 7)) % 10007
        logits = [self.scale * math.sin(state * (v + 1) * 0.7 + v) for v in range(self.vocab_size)]
        return [logits[0] + self.end_bias, *logits[1:]]

    def probabilities(self, window: list[int]) -> list[float]:
        weights = [math.exp(logit) for logit in self.logits(window)]
        return [weight / sum(weights) for weight in weights]

    def new_cache(self, rows: int, capacity: int) -> TableCache:
        assert capacity <= self.max_context
        return TableCache(rows, capacity)

    def next_logits(self, ids: Tensor, cache: TableCache, counts: Tensor | None = None) -> Tensor:
        self.rows_read.append(len(ids))
        cache.append(ids, torch.full((len(ids),), ids.shape[1]) if counts is None else counts)
        rows = zip(cache.keys.tolist(), cache.lengths.tolist(), strict=True)
        return torch.tensor([self.logits(keys[:length]) for keys, length in rows], dtype=self.dtype)

    def all_logits(self, ids: Tensor, cache: TableCache | None = None) -> Tensor:
        cache = cache or TableCache(len(ids), ids.shape[1])
        return torch.stack([self.next_logits(column, cache) for column in ids.split(1, dim=1)], dim=1)


class FixedLM(TableLM):
    """The same logits after anything."""

    def __init__(self, logits: list[float], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(vocab_size=len(logits), dtype=dtype)
        self.fixed = logits

    def logits(self, window: list[int]) -> list[float]:
        return self.fixed


class ScriptLM(TableLM):
    """Writes a script: after n tokens in all, its token n is all but certain; the last one repeats."""

    def __init__(self, script: list[int], vocab_size: int = 257) -> None:
        super().__init__(vocab_size=vocab_size)
        self.script = script

    def logits(self, window: list[int]) -> list[float]:
        token = self.script[min(len(window), len(self.script) - 1)]
        return [30.0 if v == token else 0.0 for v in range(self.vocab_size)]


class TableModule(nn.Module):
    """A table behind a module with parameters and a dropout that would be felt in training mode."""

    def __init__(self, table: TableLM) -> None:
        super().__init__()
        self.table = table
        self.vocab_size, self.max_context, self.new_cache = table.vocab_size, table.max_context, table.new_cache
        self.gain = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.9)
        self.frozen = nn.Dropout(0.9).eval()
        self.fail_after = math.inf

    def next_logits(self, ids: Tensor, cache: TableCache, counts: Tensor | None = None) -> Tensor:
        self.fail_after -= 1
        if self.fail_after < 0:
            raise RuntimeError("the model broke")
        return self.drop(self.table.next_logits(ids, cache, counts) * self.gain)

    def all_logits(self, ids: Tensor, cache: TableCache | None = None) -> Tensor:
        return self.drop(self.table.all_logits(ids, cache) * self.gain)


class ByteDecoder:
    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "<|endoftext|>" if token == 256 else self.utf8.decode(bytes([token]))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


class ByteTokenizer:
    """Bytes as tokens, end-of-text as 256: enough of a tokenizer to sample with."""

    kind = "byte"

    prefix_ids: tuple[int, ...] = ()

    def __init__(self, eot: int | None = 256, vocab_size: int = 257) -> None:
        self.eot, self.vocab_size = eot, vocab_size

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def prompt_ids(self, text: str) -> list[int]:
        return [*self.prefix_ids, *self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        decoder = ByteDecoder()
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def stream_decoder(self) -> ByteDecoder:
        return ByteDecoder()


class LetterTokenizer:
    """Token 0 is the end, the others are letters: a text for any table of a few tokens."""

    kind = "letters"
    eot = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    prefix_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]

    def prompt_ids(self, text: str) -> list[int]:
        return [*self.prefix_ids, *self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(self.push, ids))

    def stream_decoder(self) -> LetterTokenizer:
        return self

    def push(self, token: int) -> str:
        return "." if token == 0 else chr(ord("a") + token - 1)

    def flush(self) -> str:
        return ""
