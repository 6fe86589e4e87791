"""The training loss: next-token cross-entropy, with all logits at once or in chunks, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minigpt.data.batches import IGNORED
from minigpt.model.gpt import GPT
from minigpt.model.layers import widen
from minigpt.terminal import notice

# Logits per chunk. On a CPU, chunks of this size take about the time of one pass over all logits and 0.6 of its memory
# (at V = 50,304: benchmarks/long_vocabulary.py). A GPU needs larger chunks, since each chunk adds its weight gradient
# to the full one. On an H100, by arithmetic, this addition takes as long as a chunk's matrix products at 600 rows per
# chunk, and a quarter of that at 2,668 rows.
CPU_LOGITS, GPU_LOGITS = 2**24, 2**27


def next_token_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of targets (B, T) given ids (B, T), without IGNORED targets.

    If there are more than CPU_LOGITS or GPU_LOGITS logits, they are computed in chunks; see chunked_loss.
    """
    at_once = CPU_LOGITS if ids.device.type == "cpu" else GPU_LOGITS
    if ids.numel() * model.vocab_size > at_once:
        return chunked_loss(model, ids, targets, max(1, at_once // model.vocab_size))
    return plain_loss(model, ids, targets)


def plain_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy like next_token_loss, computed from all logits at once."""
    logits = model.unembed(model.trunk(ids))  # (B, T, V)
    return F.cross_entropy(widen(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def chunked_loss(model: GPT, ids: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Mean cross-entropy like next_token_loss, computed from the logits of `rows` tokens at a time.

    torch's own linear_cross_entropy (from version 2.13) does this too, but supports neither a softcap nor autocast.
    """
    hidden, targets = model.trunk(ids).flatten(0, 1), targets.flatten()  # (B T, C), (B T)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    softcap = float(model.unembed.softcap or 0.0)
    nats = _ChunkedNats.apply(hidden, model.unembed.weight, targets, rows, softcap, dtype)
    return nats / (targets != IGNORED).sum()


class _ChunkedNats(torch.autograd.Function):
    """Sum of the cross-entropies of all targets, from hidden states and the unembedding matrix.

    The forward pass computes both gradients chunk by chunk from the logits z, with dL/dz = softmax(z) - onehot(target).
    No logits are stored or recomputed: the cost is three matrix products, as without chunks.

    The returned sum and the saved tensors are not changed in place: torch 2.11 compiled that to zero gradients
    (https://github.com/pytorch/pytorch/issues/180642).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, softcap: float, dtype: torch.dtype
    ) -> Tensor:
        matrix = weight.to(dtype)  # (V, C)
        nats = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        hidden_gradients = []
        weight_gradient = torch.zeros_like(weight)
        for states, target in zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True):  # (R, C), (R)
            logits = widen(F.linear(states, matrix))  # (R, V)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            log_p = logits.log_softmax(-1)
            counts = (target != IGNORED)[:, None]  # (R, 1)
            target = target[:, None].where(counts, 0)
            nats = nats - log_p.gather(1, target).where(counts, 0.0).sum()
            slope = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
            if softcap:
                slope *= 1 - (logits / softcap).square()
            slope = slope.to(dtype)
            hidden_gradients.append((slope @ matrix).mul_(counts))
            counted = states * counts  # (R, C)
            if dtype == weight.dtype:
                weight_gradient.addmm_(slope.t(), counted)
            else:
                weight_gradient += slope.t() @ counted
        ctx.save_for_backward(torch.cat(hidden_gradients).to(hidden.dtype), weight_gradient)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, weight_gradient * gradient, None, None, None, None


def compiled_loss() -> Callable[[GPT, Tensor, Tensor], Tensor]:
    """Compile next_token_loss with torch.compile; fall back to eager, with one notice, if compilation fails."""
    compiled = torch.compile(next_token_loss, dynamic=False)
    broken = False

    def compute(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        nonlocal broken
        if not broken:
            try:
                return compiled(model, ids, targets)
            except Exception as error:  # no compiler, or a compile error: torch raises various types
                if "dynamo" not in type(error).__module__ and "inductor" not in type(error).__module__:
                    raise
                broken = True
                notice(f"torch.compile does not work here ({type(error).__name__}); training falls back to eager")
        return next_token_loss(model, ids, targets)

    return compute
