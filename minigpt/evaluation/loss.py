"""Loss of a model on held-out text: nats per token, perplexity, and bits per byte (comparable across tokenizers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.data.batches import IGNORED, ValidationWindows
from minigpt.model.modes import evaluating
from minigpt.model.precision import widen

if TYPE_CHECKING:
    from minigpt.data.shards import Corpus
    from minigpt.tokenizer.base import Tokenizer

COUNTED_AT_ONCE = 2**20
TOKENS_AT_ONCE = 2**13
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Evaluation:
    """Sums over the predicted tokens, and the metrics computed from them."""

    nats: float
    """Sum of -ln p over the predicted tokens."""
    tokens: int
    """Number of predicted tokens."""
    bytes: int
    """Number of bytes of the original text that these tokens represent (special tokens: none)."""
    added: Mapping[str, float] = field(default_factory=dict)
    """Mean of every added loss per token, by name; not part of `loss`."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the original text, comparable between tokenizers; NaN without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")


def bytes_per_token(token_bytes: list[bytes], vocab_size: int) -> Tensor:
    """Number of bytes of each id, (V) int64; 0 for special tokens and for ids beyond the tokenizer's vocabulary."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    known = min(len(token_bytes), vocab_size)
    lengths[:known] = torch.tensor([len(piece) for piece in token_bytes[:known]], dtype=torch.int64)
    return lengths


def byte_lengths(corpus: Corpus, split: str, tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Number of bytes of the original text that each id represents in a split, (V) float64.

    For verbatim tokenizers this is the length of the id's piece. If the tokenizer adds a space or normalizes the text,
    the lengths are scaled so that they sum to the bytes of the split as read during preparation.
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
    added: Any = None,
) -> Evaluation:
    """Compute the cross-entropy of every target in the windows; windows are independent.

    Args:
        model: maps ids (B, T) to logits (B, T, V). Its training mode is restored afterwards; no random numbers are
            used.
        windows: the evaluation windows; padded targets are ignored.
        byte_lengths: (V), number of bytes of each id.
        rank: rank of this process; it computes every world_size-th batch.
        world_size: number of processes.
        reduce: sums a tensor over all processes.
        on_rows: called with the number of windows done.
        added: a training objective (minigpt/training/recipe/loss.py) whose added losses are measured too.

    Returns:
        The sums over all processes, the same on each process.
    """
    device = next(model.parameters()).device
    block_size = windows.block_size
    # Windows per forward pass, limited so that activations and logits take a few hundred megabytes.
    rows = max(1, min(TOKENS_AT_ONCE // block_size, LOGITS_AT_ONCE // (block_size * len(byte_lengths))))
    nats = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)  # tokens, bytes
    others = torch.zeros(len(added.names) - 1 if added else 0, dtype=torch.float64)
    with evaluating(model):
        for first in range(0, len(windows), rows * world_size):
            # A process without windows left still joins the forward pass, because sharded weights need all processes.
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
            if added:
                others += added.per_token(logits, targets.to(device).flatten())[1:].cpu().double().sum(1)
            real = targets[targets != IGNORED]
            counts += torch.tensor([real.numel(), byte_lengths[real].sum()], dtype=torch.float64)
            on_rows(min(begin + rows * world_size, len(windows)))
    nats, counts = reduce(nats), reduce(counts)
    means = (reduce(others) / counts[0]).tolist() if added else []
    named = dict(zip(added.names[1:], means, strict=True)) if added else {}
    return Evaluation(nats=float(nats), tokens=int(counts[0]), bytes=round(float(counts[1])), added=named)
