"""Loss of a model on held-out text: nats per token, perplexity, and bits per byte (comparable across tokenizers)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.data.batches import IGNORED, ValidationWindows
from minigpt.model.layers import widen

if TYPE_CHECKING:
    from minigpt.data.shards import Corpus
    from minigpt.tokenizer.base import Tokenizer

COUNTED_AT_ONCE = 2**20
TOKENS_AT_ONCE = 2**13
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Evaluation:
    """Sums over the predicted tokens; the figures people quote follow from them."""

    nats: float
    """Sum of -ln p over the predicted tokens."""
    tokens: int
    """How many were predicted."""
    bytes: int
    """How many bytes of the text as given they stand for (special tokens stand for none)."""

    @property
    def loss(self) -> float:
        """Nats a token: the mean cross-entropy."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of the text as given, comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")


def bytes_per_token(token_bytes: list[bytes], vocab_size: int) -> Tensor:
    """How many bytes each id stands for, (V) int64; 0 for special tokens and for ids beyond the tokenizer's."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    known = min(len(token_bytes), vocab_size)
    lengths[:known] = torch.tensor([len(piece) for piece in token_bytes[:known]], dtype=torch.int64)
    return lengths


def byte_lengths(corpus: Corpus, split: str, tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """How many bytes of a split's text each id stands for, (V) float64.

    Those of its piece, where the pieces join to the text. Where the tokenizer puts a space in front or changes the
    text, they are scaled so that the whole split stands for the bytes that were read when it was prepared.
    """
    lengths = bytes_per_token(tokenizer.token_bytes(), vocab_size).double()
    if tokenizer.verbatim:
        return lengths
    stream = corpus.train if split == "train" else corpus.val
    spelled = 0.0
    for begin in range(0, len(stream), COUNTED_AT_ONCE):
        ids = stream.read(np.array([begin]), min(COUNTED_AT_ONCE, len(stream) - begin))
        spelled += float(lengths[torch.from_numpy(ids[0])].sum())
    return lengths * (corpus.counts[split]["bytes"] / spelled) if spelled else lengths


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: ValidationWindows,
    byte_lengths: Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Cross-entropy of every target in the windows, each window on its own.

    Args:
        model: ids (B, T) -> logits (B, T, V). Its training mode is put back afterwards; no random number is drawn.
        windows: what to predict; padded targets are left out of every sum.
        byte_lengths: (V), how many bytes each id stands for.
        rank: this process's number; it takes every world_size-th forward.
        world_size: how many processes share the work.
        reduce: sums a tensor over all processes.
        on_rows: told how many windows are done.

    Returns:
        The sums over all processes, the same on each.
    """
    device = next(model.parameters()).device
    block_size = windows.block_size
    # As many windows a forward as keep the tokens and the logits at a few hundred megabytes.
    rows = max(1, min(TOKENS_AT_ONCE // block_size, LOGITS_AT_ONCE // (block_size * len(byte_lengths))))
    nats = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)  # tokens, bytes
    training = model.training
    model.eval()
    try:
        for first in range(0, len(windows), rows * world_size):
            # Who has none left joins the last forward all the same: weights in pieces are gathered by all together.
            begin = first + rank * rows
            idle = begin >= len(windows)
            ids, targets = windows.read(slice(0, 1) if idle else slice(begin, begin + rows))
            if idle:
                targets = torch.full_like(targets, IGNORED)
            logits = widen(model(ids.to(device)).flatten(0, 1))  # (B T, V)
            loss = F.cross_entropy(
                logits, targets.to(device).flatten(), ignore_index=IGNORED, reduction="none"
            )  # (B T), 0 where padded
            nats += loss.cpu().double().sum()
            real = targets[targets != IGNORED]
            counts += torch.tensor([real.numel(), byte_lengths[real].sum()], dtype=torch.float64)
            on_rows(min(begin + rows * world_size, len(windows)))
    finally:
        model.train(training)
    nats, counts = reduce(nats), reduce(counts)
    return Evaluation(nats=float(nats), tokens=int(counts[0]), bytes=round(float(counts[1])))
