"""The kinds of positions. A kind is a module, made as Kind(config), that acts in one or more of three ways:

    embed(positions)             (T) or (B, T) -> (..., T, C), added to the token embeddings
    rotate(x, positions)         (B, heads, T, D) -> same, applied to queries and keys
    bias(queries, keys)          positions (..., T), (S) -> (..., H, T, S), added to the attention scores

One module embeds for the whole model; each layer has one of its own that rotates or adds a bias. A kind with a static
method `layers(layer) -> bool` acts only in some layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model import byhand
from minigpt.model.config import POSITIONS

if TYPE_CHECKING:
    from minigpt.model.config import GPTConfig


class Learned(nn.Embedding):
    """A learned embedding per position, as in GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.block_size, config.n_embd)
        self.std = 1.0 if config.zero_init and not config.tie_embeddings else 0.02

    def begin(self, generator: torch.Generator | None) -> None:
        """Normal, with the standard deviation of the token embeddings."""
        nn.init.normal_(self.weight, std=self.std, generator=generator)

    def embed(self, positions: Tensor) -> Tensor:  # (T) or (B, T) -> (..., T, C)
        """The embeddings of these positions."""
        return F.embedding(positions, self.weight)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairs as in Llama.

    The pair of channels i and i + D/2 of a head is rotated by the angle position * theta^(-2i/D).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.register_buffer("cos", torch.empty(config.block_size, self.head_dim), persistent=False)  # (S, D)
        self.register_buffer("sin", torch.empty(config.block_size, self.head_dim), persistent=False)  # (S, D)
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

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:  # (B, heads, T, D), (T) or (B, T)
        """Rotate queries or keys by the angles of their positions."""
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D) or (B, T, D)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D)
        if byhand.suits(x):
            return byhand.Rotated.apply(x, cos, sin)
        swapped = torch.cat(x.chunk(2, -1)[::-1], -1)  # (B, heads, T, D): the two halves swapped
        return (x * cos + swapped * sin).to(x.dtype)


def make_embedding(config: GPTConfig) -> nn.Module | None:
    """The module that embeds positions; None if the config's kind does not embed."""
    return _made(config) if config.adds("embed") else None


def make_in_attention(config: GPTConfig, layer: int) -> nn.Module | None:
    """The module that rotates or biases in this layer; None if the config's kind does neither there."""
    return _made(config) if config.adds("rotate", layer) or config.adds("bias", layer) else None


def _made(config: GPTConfig) -> nn.Module:
    return POSITIONS.bound(str(config.position), config.own("position"))(config)
