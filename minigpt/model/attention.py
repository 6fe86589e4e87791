"""Causal self-attention with grouped key/value heads, using PyTorch's fused kernel; explicit.py has its twin."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.cache import KVCache, Step
from minigpt.model.config import GPTConfig
from minigpt.model.norms import RMSNorm
from minigpt.model.positions import make_in_attention
from minigpt.model.precision import widen


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762).

    Groups of H / G query heads share one of G key/value heads (Ainslie et al. 2023, arXiv 2305.13245):

        queries   0 1 2 3 4 5      H = 6
        keys      0 0 1 1 2 2      G = 3
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        assert config.n_kv_head is not None and config.head_dim is not None
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.dropout = config.attn_dropout or 0.0
        bias = bool(config.bias)
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=bias)
        self.proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config) if config.qk_norm else None
        self.position = make_in_attention(config, layer)
        self.rotates, self.biases = (config.adds(way, layer) for way in ("rotate", "bias"))

    def heads(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, H + 2G, T, D)
        """Project the normed residual stream to queries, keys and values, concatenated along the head axis."""
        return self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def normed(self, qk: Tensor) -> Tensor:  # (B, H + G, T, D) -> (B, H + G, T, D)
        """Apply the query and key norms, in one pass where the norms have no weights."""
        assert self.q_norm is not None and self.k_norm is not None
        if self.q_norm.weight is None:
            return self.q_norm(qk)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        return torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:  # (B, heads, T, D) -> same
        """Apply the positions to queries or keys, if they rotate."""
        return self.position.rotate(x, positions) if self.rotates else x  # type: ignore[union-attr, operator]

    def seen(self, step: Step, device: torch.device) -> Tensor:  # (1 or B, 1, T, S)
        """Which slots each query may attend to."""
        slots = torch.arange(step.width, device=device)
        return slots <= step.positions.reshape(-1, 1, step.positions.shape[-1], 1)

    def score_bias(self, step: Step, device: torch.device) -> Tensor | None:  # (H, T, S) or (B, H, T, S)
        """What the positions add to the scores; None if they add nothing."""
        if not self.biases:
            return None
        slots = torch.arange(step.width, device=device)
        return self.position.bias(step.positions, slots)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        # On a CPU, the backward pass of attention takes several times as long in bfloat16 as in float32.
        wide = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        heads = widen(self.heads(x)) if wide else self.heads(x)  # (B, H + 2G, T, D)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        if self.q_norm is not None:
            qk = self.normed(qk)  # (B, H + G, T, D)
        qk = self.turned(qk, step.positions)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)  # (B, H, T, D), (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, step)  # (B, G, S, D)
        mask, causal = step.mask, step.causal
        if self.biases:
            bias = self.score_bias(step, x.device)
            assert bias is not None
            mask, causal = (
                bias.to(q.dtype).masked_fill(~self.seen(step, x.device), -torch.inf),
                False,
            )  # (1 or B, H, T, S)
        with torch.autocast("cpu", enabled=False) if wide else nullcontext():
            z = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.n_kv_head != self.n_head,
            )  # (B, H, T, D)
        return self.proj(z.transpose(1, 2).flatten(2))  # (B, T, C)
