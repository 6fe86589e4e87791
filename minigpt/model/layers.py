"""Norms, rotary positions, MLP, n-gram embeddings. gpt.py explains the letters in shape comments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import byhand
from minigpt.model.config import GPTConfig


def widen(x: Tensor) -> Tensor:
    """Convert to at least float32: half precision becomes float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """Layer normalization with weight and optional bias (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__(width, eps=eps, bias=bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    The weight is None if the config has no norm weights.
    """

    def __init__(self, width: int, eps: float, weight: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if weight else None

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if byhand.suits(x):
            y = byhand.ScaledToUnit.apply(x, self.eps)
            return y if self.weight is None else y * self.weight
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


def make_norm(config: GPTConfig, width: int) -> LayerNorm | RMSNorm:
    """Create the norm selected by the config, over `width` channels."""
    if config.norm == "layernorm":
        return LayerNorm(width, config.norm_eps, bool(config.bias))
    return RMSNorm(width, config.norm_eps, bool(config.norm_weight))


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

    def forward(self, history: Tensor) -> Tensor:  # (B, T, n or more): the token, the one before, ... -> (B, T, C)
        group = history[..., 0]
        for back in range(1, self.n):
            group = group * self.base + history[..., back] + 1  # -1 (no token) becomes 0
        if self.hashed:  # Fibonacci hashing: 2^64 divided by the golden ratio, then the upper bits
            group = (group * -7046029254386353131 >> 33) % len(self.weight)
        return F.embedding(group, self.weight)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairs as in Llama.

    The pair of channels i and i + D/2 of a head is rotated by the angle position * theta^(-2i/D).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, block_size: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("cos", torch.empty(block_size, head_dim), persistent=False)  # (S, D)
        self.register_buffer("sin", torch.empty(block_size, head_dim), persistent=False)  # (S, D)
        if not self.cos.is_meta:
            self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Recompute the tables, optionally on another device. Needed after the model was created on the meta device."""
        device = self.cos.device if device is None else device
        exponent = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim  # (D/2)
        frequency = 1 / self.theta**exponent
        angle = torch.arange(len(self.cos), device=device).float()[:, None] * frequency  # (S, D/2)
        self.cos = angle.cos().repeat(1, 2)
        self.sin = torch.cat((-angle.sin(), angle.sin()), -1)  # includes the sign of the swapped half

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # (B, heads, T, D), (T) or (B, T)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D) or (B, T, D)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D)
        if byhand.suits(x):
            return byhand.Rotated.apply(x, cos, sin)
        swapped = torch.cat(x.chunk(2, -1)[::-1], -1)  # (B, heads, T, D): the two halves swapped
        return (x * cos + swapped * sin).to(x.dtype)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between; swiglu adds a gate (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, inner, bias = config.n_embd, config.n_inner, bool(config.bias)
        assert inner is not None
        self.activation = config.activation
        self.up = nn.Linear(width, inner, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if config.activation == "swiglu" else None
        self.down = nn.Linear(inner, width, bias=bias)

    def hidden(self, pre: Tensor, gate: Tensor | None) -> Tensor:  # (B, T, inner) -> (B, T, inner)
        """Apply the activation; relu2 is the squared ReLU (So et al. 2021, arXiv 2109.08668)."""
        if gate is not None:
            return F.silu(gate) * pre
        if self.activation == "relu2":
            return byhand.SquaredReLU.apply(pre) if byhand.suits(pre, half=True) else F.relu(pre).square()
        return F.gelu(pre, approximate="tanh" if self.activation == "gelu" else "none")

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(self.hidden(self.up(x), None if self.gate is None else self.gate(x)))
