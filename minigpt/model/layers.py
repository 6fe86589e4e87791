"""The MLP and the n-gram embeddings. gpt.py explains the letters in shape comments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.config import ACTIVATIONS, GPTConfig


class NgramEmbedding(nn.Module):
    """An embedding of n-grams (a token and the n - 1 before it), added to the token embedding; initialized to zero
    (Huang et al. 2025, arXiv 2501.16975).

    With V tokens there are V (V + 1)^(n-1) n-grams, because previous tokens may be missing at the start of a text. If
    `rows` is at least that, each n-gram has its own row; otherwise n-grams are hashed to `rows` rows.
    """

    def __init__(self, n: int, vocab_size: int, rows: int, width: int) -> None:
        super().__init__()
        self.n, self.base = n, vocab_size + 1
        groups = vocab_size * self.base ** (n - 1)
        self.hashed = rows < groups
        self.weight = nn.Parameter(torch.empty(min(rows, groups), width))

    def begin(self, generator: torch.Generator | None) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)

    def forward(self, history: Tensor) -> Tensor:  # (B, T, n or more): the token, the one before, ... -> (B, T, C)
        group = history[..., 0]
        for back in range(1, self.n):
            group = group * self.base + history[..., back] + 1  # -1 (no token) becomes 0
        if self.hashed:  # Fibonacci hashing: 2^64 divided by the golden ratio, then the upper bits
            group = (group * -7046029254386353131 >> 33) % len(self.weight)
        return F.embedding(group, self.weight)


class MLP(nn.Module):
    """Two matrices with an activation between; a gated activation has a third (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, inner, bias = config.n_embd, config.n_inner, bool(config.bias)
        assert inner is not None
        self.activation = ACTIVATIONS.bound(str(config.activation), config.own("activation"))
        self.up = nn.Linear(width, inner, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if config.gated else None
        self.down = nn.Linear(inner, width, bias=bias)

    def hidden(self, pre: Tensor, gate: Tensor | None) -> Tensor:  # (B, T, inner) -> (B, T, inner)
        """Apply the activation."""
        return self.activation(pre) if gate is None else self.activation(pre, gate)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(self.hidden(self.up(x), None if self.gate is None else self.gate(x)))
