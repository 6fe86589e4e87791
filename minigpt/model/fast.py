"""A model whose decoding step is compiled: kept beside the model, never in its place.

Decoding reads one token a row again and again, and at that size much of the time goes into calling small operations
one by one. torch.compile makes one function of the step. It is compiled once for all lengths, and again only where the
number of rows turns from one to several or rows turn out of step. Prompts are read by the model as it is.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from minigpt.model.cache import KVCache, Step
from minigpt.model.gpt import GPT
from minigpt.terminal import notice


class Compiled(nn.Module):
    """A GPT as decoding sees it, with a compiled step. Its weights are the model's own, as they were at its making.

    Args:
        model: in evaluation mode while it decodes.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.vocab_size, self.max_context = model.vocab_size, model.max_context
        self.new_cache, self.all_logits = model.new_cache, model.all_logits
        # Where PyTorch can, models compiled in one process do not share a limit on compilations.
        apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        self.step = torch.compile(_step, fullgraph=True, **{"isolate_recompiles": True} if apart else {})
        self.broken = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """As `GPT.next_logits`; one token a row goes through the compiled step."""
        if self.broken or ids.shape[1] > 1 or cache.longest == 0:
            return self.model.next_logits(ids, cache, counts)
        step = self.model.trunk.begin(ids, cache)
        slots = torch.arange(step.width, device=ids.device)  # its size is the one thing that changes from step to step
        torch._dynamo.maybe_mark_dynamic(slots, 0)
        try:
            logits = self.step(self.model, ids, cache.keys, cache.values, step.positions, slots)
        except Exception as error:  # no compiler, or a kernel that does not compile: both come as many types
            if "dynamo" not in type(error).__module__ and "inductor" not in type(error).__module__:
                raise
            self.broken = True
            notice(f"torch.compile does not work here ({type(error).__name__}); decoding goes on uncompiled")
            return self.model.next_logits(ids, cache, counts)
        cache.advance(step)
        return logits


def compiled(model: GPT) -> Compiled:
    """The model with a compiled decoding step; compilation happens at the first step, and takes some seconds."""
    return Compiled(model)


class _Slots:
    """The part of a cache that a compiled step works on: tensors alone, so that no plain number is compiled in."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`."""
        keys, values = self.keys[layer], self.values[layer]
        if step.positions.dim() == 1:
            keys[:, :, step.positions] = k
            values[:, :, step.positions] = v
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            keys[rows, :, step.positions] = k.transpose(1, 2)
            values[rows, :, step.positions] = v.transpose(1, 2)
        return keys[:, :, : step.width], values[:, :, : step.width]


def _step(
    model: GPT,
    ids: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    positions: Tensor,
    slots: Tensor,
) -> Tensor:  # (B, 1) -> (B, V)
    # One query a row: where all rows stand at the same place it sees every slot.
    mask = None if positions.dim() == 1 else (slots <= positions[:, :, None])[:, None]  # (B, 1, 1, S)
    step = Step(positions, mask, False, slots.shape[0])
    cache = _Slots(keys, values)
    x = model.trunk.start(ids, step)  # (B, 1, C)
    for block in model.trunk.blocks:
        x = block(x, step, cache)
    return model.unembed(model.trunk.norm(x)[:, -1])
