"""The training loss: next-token cross-entropy and added losses; all logits at once or in chunks, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minigpt.choices import under
from minigpt.data.batches import IGNORED
from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.model.precision import widen
from minigpt.terminal import notice
from minigpt.training.config import LOSSES

# Logits per chunk. On a CPU, chunks of this size take about the time of one pass over all logits and 0.6 of its memory
# (at V = 50,304: benchmarks/long_vocabulary.py). A GPU needs larger chunks, since each chunk adds its weight gradient
# to the full one. On an H100, by arithmetic, this addition takes as long as a chunk's matrix products at 600 rows per
# chunk, and a quarter of that at 2,668 rows.
CPU_LOGITS, GPU_LOGITS = 2**24, 2**27


class Terms(NamedTuple):
    """Mean losses of one forward pass over the targets that count."""

    total: Tensor
    """Scalar to differentiate: the cross-entropy plus the added losses times their weights."""
    means: Tensor
    """(1 + n), detached: the cross-entropy in nats, then every added loss without its weight."""


class Added(NamedTuple):
    """A loss added to the cross-entropy: (logits (N, V), targets (N)) -> (N) nats."""

    name: str
    weight: float
    function: Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The loss of a training step: next-token cross-entropy, and the losses that the config adds to it.

    Every step calls it: eager, compiled, sharded, in `minigpt plan`. Targets that are IGNORED do not count.
    """

    def __init__(self, added: Sequence[Added] = ()) -> None:
        self.added = tuple(added)

    @classmethod
    def of(cls, losses: Mapping[str, Any]) -> Objective:
        """The objective of a config's `losses`."""
        names = [name for name in losses if "." not in name]
        return cls([Added(name, losses[name], LOSSES.bound(name, under(name, losses))) for name in names])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the means: loss, then the added losses."""
        return ("loss", *(each.name for each in self.added))

    def __call__(self, model: GPT, ids: Tensor, targets: Tensor) -> Terms:
        """Compute the losses of targets (B, T) given ids (B, T)."""
        if not self.added:
            loss = next_token_loss(model, ids, targets)
            return Terms(loss, loss.detach()[None])
        hidden = model.trunk(ids).flatten(0, 1)  # (B T, C)
        means = self._sums(model, hidden, targets.flatten(), rows_at_once(model, ids)) / (targets != IGNORED).sum()
        weights = means.new_tensor([1.0, *(each.weight for each in self.added)])
        return Terms((means * weights).sum(), means.detach())

    def _sums(self, model: GPT, hidden: Tensor, targets: Tensor, rows: int | None) -> Tensor:  # (1 + n)
        """Sums over all targets, from the logits of `rows` tokens at a time.

        Autograd differentiates added losses. With several chunks the logits are not kept but computed again.
        """

        def part(states: Tensor, target: Tensor) -> Tensor:
            return self.per_token(model.unembed(states), target).sum(1)

        if rows is None:
            return part(hidden, targets)
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum(0)

    def per_token(self, logits: Tensor, targets: Tensor) -> Tensor:  # (N, V), (N) -> (1 + n, N)
        """The losses of each token; 0 where the target is IGNORED."""
        logits, counts = widen(logits), targets != IGNORED
        known = targets.where(counts, 0)
        rows = [F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")]
        for each in self.added:
            found = each.function(logits, known)
            if found.shape != targets.shape:
                raise ConfigError(
                    f"losses.{each.name}: returned shape {tuple(found.shape)}; expected one number per token, "
                    f"{tuple(targets.shape)}"
                )
            rows.append(found.where(counts, 0.0).to(rows[0]))
        return torch.stack(rows)


def next_token_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of targets (B, T) given ids (B, T), without IGNORED targets.

    If there are more than CPU_LOGITS or GPU_LOGITS logits, they are computed in chunks; see chunked_loss.
    """
    rows = rows_at_once(model, ids)
    return plain_loss(model, ids, targets) if rows is None else chunked_loss(model, ids, targets, rows)


def rows_at_once(model: GPT, ids: Tensor) -> int | None:
    """How many tokens to compute logits of at a time; None for all of ids (B, T)."""
    at_once = CPU_LOGITS if ids.device.type == "cpu" else GPU_LOGITS
    return max(1, at_once // model.vocab_size) if ids.numel() * model.vocab_size > at_once else None


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


def compiled(objective: Objective) -> Callable[[GPT, Tensor, Tensor], Terms]:
    """Compile an objective with torch.compile; fall back to eager, with one notice, if compilation fails."""
    fast = torch.compile(objective.__call__, dynamic=False)
    broken = False

    def compute(model: GPT, ids: Tensor, targets: Tensor) -> Terms:
        nonlocal broken
        if not broken:
            try:
                return Terms(*fast(model, ids, targets))
            except Exception as error:  # no compiler, or a compile error: torch raises various types
                if "dynamo" not in type(error).__module__ and "inductor" not in type(error).__module__:
                    raise
                broken = True
                notice(f"torch.compile does not work here ({type(error).__name__}); training falls back to eager")
        return objective(model, ids, targets)

    return compute
