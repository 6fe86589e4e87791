"""The explicit twin of the forward pass: the same parameters, no fused operations, a hook at every activation.

The regular forward pass has no hooks or identity modules. To read or change activations, run these functions instead.
A tap is called as tap(name, activation); the computation continues with the tensor that it returns. Names and shapes
are the classic ones of TransformerLens, for example

    blocks.3.attn.hook_pattern   (B, H, T, S)    attention weights after the softmax
    blocks.3.hook_resid_mid      (B, T, C)       residual stream between attention and MLP

A few activations cost extra time and memory: the inputs and outputs of individual heads. They are computed only if
the tap asks for them with a method `wants(name)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minigpt.model.attention import Attention
from minigpt.model.cache import KVCache, Step
from minigpt.model.gpt import GPT, Block, Trunk
from minigpt.model.layers import MLP
from minigpt.model.norms import RMSNorm, Tap, explicit_norm


def untouched(name: str, activation: Tensor) -> Tensor:
    """Identity tap: return the activation unchanged."""
    return activation


def wants(tap: Tap, name: str) -> bool:
    """Whether a tap asks for an activation that is only computed on request."""
    return hasattr(tap, "wants") and tap.wants(name)


def separate_heads(
    attn: Attention, norm: nn.Module, x: Tensor, tap: Tap, at: str = ""
) -> Tensor:  # (B, T, C) -> (B, H + 2G, T, D)
    """Compute queries, keys and values with a separate copy of the residual stream per head.

    The copies are hook_q_input (B, T, H, C), hook_k_input and hook_v_input (B, T, G, C); each is normed separately.
    """
    made, begin = [], 0
    for letter, count in (("q", attn.n_head), ("k", attn.n_kv_head), ("v", attn.n_kv_head)):
        read = tap(f"{at}hook_{letter}_input", x[:, :, None].expand(-1, -1, count, -1))  # (B, T, heads, C)
        rows = slice(begin * attn.head_dim, (begin + count) * attn.head_dim)
        weight = attn.qkv.weight[rows].unflatten(0, (count, attn.head_dim))  # (heads, D, C)
        heads = torch.einsum("bthc,hdc->bhtd", explicit_norm(norm, read), weight)
        made.append(heads if attn.qkv.bias is None else heads + attn.qkv.bias[rows].view(count, 1, attn.head_dim))
        begin += count
    return torch.cat(made, 1)


def explicit_attention(
    attn: Attention, heads: Tensor, step: Step, cache: KVCache | None = None, tap: Tap = untouched, at: str = ""
) -> Tensor:  # (B, H + 2G, T, D) -> (B, T, C)
    """Unfused attention: scores, softmax, weighted sum. q, k, v and z go through the tap as (B, T, heads, D)."""

    def tapped(name: str, heads: Tensor) -> Tensor:  # (B, heads, T, D); the tap gets (B, T, heads, D)
        return tap(at + name, heads.transpose(1, 2)).transpose(1, 2)

    def normed(norm: RMSNorm | None, heads: Tensor, name: str) -> Tensor:
        if norm is None:
            return heads
        return explicit_norm(norm, heads.transpose(1, 2), tap, at + name).transpose(1, 2)

    counts = (attn.n_head, attn.n_kv_head, attn.n_kv_head)
    q, k, v = heads.split(counts, dim=1)  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
    q, k, v = tapped("hook_q", q), tapped("hook_k", k), tapped("hook_v", v)
    q, k = normed(attn.q_norm, q, "q_norm."), normed(attn.k_norm, k, "k_norm.")
    if attn.rotates:
        q = tapped("hook_rot_q", attn.turned(q, step.positions))
        k = tapped("hook_rot_k", attn.turned(k, step.positions))
    if cache is not None:
        k, v = cache.append(attn.layer, k, v, step)  # (B, G, S, D)
    group = attn.n_head // attn.n_kv_head
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(attn.head_dim)  # (B, H, T, S)
    bias = attn.score_bias(step, heads.device)
    scores = scores if bias is None else scores + bias
    scores = tap(f"{at}hook_attn_scores", scores.masked_fill(~attn.seen(step, heads.device), -torch.inf))
    pattern = tap(f"{at}hook_pattern", scores.softmax(-1))
    pattern = nn.functional.dropout(pattern, attn.dropout, attn.training)
    z = tapped("hook_z", pattern @ v)  # (B, H, T, D)
    if wants(tap, f"{at}hook_result"):
        weight = attn.proj.weight.unflatten(1, (attn.n_head, attn.head_dim))  # (C, H, D)
        result = tap(f"{at}hook_result", torch.einsum("bhtd,chd->bthc", z, weight)).sum(2)
        return result if attn.proj.bias is None else result + attn.proj.bias
    return attn.proj(z.transpose(1, 2).flatten(2))


def explicit_mlp(mlp: MLP, x: Tensor, tap: Tap = untouched, at: str = "") -> Tensor:  # (B, T, C) -> (B, T, C)
    """MLP with taps before and after the nonlinearity: hook_pre and hook_post (B, T, inner).

    In a gated MLP, hook_pre is the gate projection and hook_pre_linear the up projection.
    """
    if mlp.gate is not None:
        gate = tap(f"{at}hook_pre", mlp.gate(x))
        hidden = mlp.hidden(tap(f"{at}hook_pre_linear", mlp.up(x)), gate)
    else:
        hidden = mlp.hidden(tap(f"{at}hook_pre", mlp.up(x)), None)
    return mlp.down(tap(f"{at}hook_post", hidden))


def explicit_block(
    block: Block, x: Tensor, step: Step, cache: KVCache | None = None, tap: Tap = untouched, at: str = ""
) -> Tensor:  # (B, T, C) -> (B, T, C)
    """Block with taps on the residual stream and on every term added to it."""
    x = tap(f"{at}hook_resid_pre", x)
    if any(wants(tap, f"{at}hook_{letter}_input") for letter in "qkv"):
        heads = separate_heads(block.attn, block.norm1, x, tap, at)  # (B, H + 2G, T, D)
    else:
        heads = block.attn.heads(explicit_norm(block.norm1, x, tap, f"{at}ln1."))
    attn_out = block.drop(explicit_attention(block.attn, heads, step, cache, tap, f"{at}attn."))
    x = tap(f"{at}hook_resid_mid", x + tap(f"{at}hook_attn_out", attn_out))
    normed = explicit_norm(block.norm2, tap(f"{at}hook_mlp_in", x), tap, f"{at}ln2.")
    mlp_out = block.drop(explicit_mlp(block.mlp, normed, tap, f"{at}mlp."))
    return tap(f"{at}hook_resid_post", x + tap(f"{at}hook_mlp_out", mlp_out))


def explicit_trunk(trunk: Trunk, ids: Tensor, cache: KVCache | None = None, tap: Tap = untouched) -> Tensor:
    """Trunk with taps: token ids (B, T) -> normed hidden states (B, T, C)."""
    step = trunk.begin(ids, cache)
    x = tap("hook_embed", trunk.embed(ids))
    for name, term in trunk.ngrams(ids, step, cache):
        x = x + tap(f"hook_{name}_embed", term)
    if trunk.position is not None:
        x = x + tap("hook_pos_embed", trunk.position.embed(step.positions).expand_as(x))  # type: ignore[operator]
    x = trunk.drop(x)
    for layer, block in enumerate(trunk.blocks):
        assert isinstance(block, Block)
        x = explicit_block(block, x, step, cache, tap, f"blocks.{layer}.")
    if cache is not None:
        cache.advance(step)
    return explicit_norm(trunk.norm, x, tap, "ln_final.")


def explicit_forward(model: GPT, ids: Tensor, cache: KVCache | None = None, tap: Tap = untouched) -> Tensor:
    """Model with taps: token ids (B, T) -> logits (B, T, V)."""
    return model.unembed(explicit_trunk(model.trunk, ids, cache, tap))
