"""A copy of a model laid out for fast decoding.

Decoding reads one token per row again and again. On a CPU nearly all of its time goes into fetching weights, and the
usual layout is not the one that this is quickest in: `fast` keeps a second copy of the matrices, laid out for it. On a
small model what is left goes into calling small operations one by one, of which torch.compile makes one function.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.model.cache import KVCache, Step
from minigpt.model.gpt import GPT, Unembed
from minigpt.terminal import notice

LARGE = 2**20  # entries from which a matrix read for one row is quicker packed than transposed


def fast(model: GPT, rows: int = 1, compiled: bool = False) -> GPT | Compiled:
    """The model as it is now, made ready for decoding; later changes of its weights do not reach the copy.

    Args:
        model: its parameters other than matrices are shared.
        rows: how many rows are to be decoded together, for the layout; others work too.
        compiled: compile the step that reads one token per row; pays for many tokens, as the first one takes long.

    Returns:
        What `Sampler` takes in place of the model; the model itself where it is not float32 on a CPU with oneDNN.
    """
    weight = model.unembed.weight
    known = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    known = known and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known:
        return Compiled(model) if compiled else model
    if not compiled:
        return _relaid(model, rows, True)
    # The compiler packs by itself, but then it packs all.
    transposes = rows == 1 and max(layer.weight.numel() for layer in _linears(model)) < LARGE
    return Compiled(_relaid(model, rows, False)) if transposes else Compiled(model, packs=True)


def _linears(model: GPT) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _relaid(module: nn.Module, rows: int, pack: bool) -> Any:
    """The module with every matrix in the layout that it is quickest in; what is not a matrix, it shares."""
    twin = copy.copy(module)
    if isinstance(module, GPT):
        twin.__class__ = RelaidGPT
    twin._modules = {name: child and _relaid(child, rows, pack) for name, child in module._modules.items()}
    if isinstance(module, (nn.Linear, Unembed)):
        out, into = module.weight.shape
        if rows == 1 and out * into < LARGE:
            if into >= out:
                return twin
            columns = nn.Parameter(module.weight.detach().t().contiguous().t(), requires_grad=False)
            twin._parameters = {**module._parameters, "weight": columns}
        elif pack:
            twin.__class__ = PackedLinear if isinstance(module, nn.Linear) else PackedUnembed
            twin.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
    return twin


class RelaidGPT(GPT):
    """A GPT with its matrices laid out for decoding; of what it computes no gradient can be taken."""

    @torch.inference_mode()
    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """As `GPT.next_logits`."""
        return super().next_logits(ids, cache, counts)


class PackedLinear(nn.Linear):
    """A linear layer with its matrix in oneDNN's layout."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedUnembed(Unembed):
    """The unembedding with its matrix in oneDNN's layout."""

    packed: Tensor

    def project(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        """The logits before any cap."""
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, None, "none", [], "")


class Compiled(nn.Module):
    """A GPT as decoding sees it, with a compiled step.

    It is compiled once for all lengths, and again only where the number of rows turns from one to several or rows turn
    out of step. Prompts are read by the model as it is.

    Args:
        model: in evaluation mode while it decodes.
        packs: let the compiler keep packed copies of the matrices.
    """

    def __init__(self, model: GPT, packs: bool = False) -> None:
        super().__init__()
        self.model = model
        self.vocab_size, self.max_context = model.vocab_size, model.max_context
        self.new_cache, self.all_logits = model.new_cache, model.all_logits
        given: dict[str, Any] = {"options": {"freezing": True}} if packs else {}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            given["isolate_recompiles"] = True  # models compiled in one process do not share a limit on compilations
        self.step = torch.compile(_step, fullgraph=True, **given)
        self.broken = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """As `GPT.next_logits`; one token per row goes through the compiled step."""
        if self.broken or ids.shape[1] > 1 or cache.longest == 0:
            return self.model.next_logits(ids, cache, counts)
        step = self.model.trunk.begin(ids, cache)
        slots = torch.arange(step.width, device=ids.device)  # its size is the one thing that changes from step to step
        torch._dynamo.maybe_mark_dynamic(slots, 0)
        try:
            logits = self.step(self.model, ids, cache.keys, cache.values, cache.ids, step.positions, slots)
        except Exception as error:  # no compiler, or a kernel that does not compile: both come as many types
            if "dynamo" not in type(error).__module__ and "inductor" not in type(error).__module__:
                raise
            self.broken = True
            notice(f"torch.compile does not work here ({type(error).__name__}); decoding goes on uncompiled")
            return self.model.next_logits(ids, cache, counts)
        cache.advance(step)
        return logits


class _Slots(KVCache):
    """The part of a cache that a compiled step works on: tensors alone, so that no plain number is compiled in."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], ids: list[Tensor]) -> None:
        self.keys, self.values, self.ids = keys, values, ids

    @property
    def rows(self) -> int:
        """As `KVCache.rows`."""
        return self.ids[0].shape[0]

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
    held: list[Tensor],
    positions: Tensor,
    slots: Tensor,
) -> Tensor:  # (B, 1) -> (B, V)
    # One query a row: where all rows stand at the same place it sees every slot.
    mask = None if positions.dim() == 1 else (slots <= positions[:, :, None])[:, None]  # (B, 1, 1, S)
    step = Step(positions, mask, False, slots.shape[0])
    cache = _Slots(keys, values, held)
    x = model.trunk.start(ids, step, cache)  # (B, 1, C)
    for block in model.trunk.blocks:
        x = block(x, step, cache)
    return model.unembed(model.trunk.norm(x)[:, -1])
