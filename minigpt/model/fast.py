"""A copy of a model laid out for fast decoding.

Decoding reads one token per row again and again. On a CPU nearly all of its time goes into fetching weights, and the
usual layout is not the one that this is quickest in: `fast` keeps a second copy of the matrices, laid out for it. On a
small model what is left goes into calling small operations one by one, of which torch.compile makes one function.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.model.cache import KVCache, Step
from minigpt.model.gpt import GPT, Trunk, Unembed
from minigpt.terminal import notice

LARGE = 2**20  # entries; for one row, matrices of at least this size are faster packed, smaller ones transposed


def fast(model: GPT, rows: int = 1, compiled: bool = False) -> GPT | Compiled:
    """Return a copy of the model optimized for decoding. It shares no memory with the model.

    A copy is for decoding only: it cannot be saved, moved, cast, copied, pickled or given other weights.

    Args:
        model: the model to copy.
        rows: how many rows are to be decoded together, for the layout; others work too.
        compiled: compile the step that reads one token per row; pays for many tokens, as the first one takes long.

    Returns:
        A model that `Sampler` accepts. A subclass of GPT comes back as it is. Unless the model is float32 on a CPU with
        oneDNN, there is no copy: the result is the model itself, or a compiled wrapper that follows its weights. A
        large float32 model that is compiled is not copied either; its wrapper refuses to decode with other weights
        than those that it was compiled for.
    """
    if type(model) is not GPT or type(model.trunk) is not Trunk:
        return model  # a subclass may compute something else than the copies here
    weight = model.unembed.weight
    known = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    known = known and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known:
        return Compiled(model) if compiled else model
    if not compiled:
        return _relaid(model, rows, True, {})
    # The compiler can pack matrices itself, but only all of them.
    transposes = rows == 1 and max(layer.weight.numel() for layer in _linears(model)) < LARGE
    return Compiled(_relaid(model, rows, False, {})) if transposes else Compiled(model, packs=True)


def _linears(model: GPT) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def _relaid(module: nn.Module, rows: int, pack: bool, copies: dict[int, Tensor]) -> Any:
    """Copy the module with every matrix in its fastest layout. `copies` has the copy of each tensor by its id."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # its tensors, submodules and hooks
            vars(twin)[name] = copy.copy(value)
    if isinstance(module, GPT):
        twin.__class__ = RelaidGPT
    twin._modules = {name: child and _relaid(child, rows, pack, copies) for name, child in module._modules.items()}
    own = dict(module._parameters)
    if isinstance(module, (nn.Linear, Unembed)) and type(module) in (nn.Linear, Unembed):
        out, into = module.weight.shape
        if rows == 1 and out * into < LARGE:
            if into < out:
                columns = nn.Parameter(module.weight.detach().t().contiguous().t(), requires_grad=False)
                copies = {**copies, id(module.weight): columns}
        elif pack:
            twin.__class__ = PackedUnembed if isinstance(module, Unembed) else PackedLinear
            twin.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            own["weight"] = None
    twin._parameters = {name: value if value is None else _copied(value, copies) for name, value in own.items()}
    twin._buffers = {name: value if value is None else _copied(value, copies) for name, value in twin._buffers.items()}
    return twin


def _copied(tensor: Tensor, copies: dict[int, Tensor]) -> Any:
    """A copy of a tensor; the same copy for the same tensor, such as tied embeddings."""
    if id(tensor) not in copies:
        twin = tensor.detach().clone()
        copies[id(tensor)] = nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
    return copies[id(tensor)]


class Decoder(nn.Module):
    """What `fast` returns: it refuses what a copy for decoding cannot do."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            "minigpt.fast: a copy for decoding cannot be saved, moved, cast, copied, pickled or given other weights; "
            "do it with the model, and call minigpt.fast again"
        )

    state_dict = load_state_dict = _apply = __deepcopy__ = __reduce_ex__ = _refuse


class RelaidGPT(Decoder, GPT):
    """A GPT whose matrices are laid out for decoding. It runs in inference mode, so it has no gradients."""

    @torch.inference_mode()
    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """See `GPT.next_logits`."""
        return super().next_logits(ids, cache, counts)


class PackedLinear(nn.Linear):
    """A linear layer with its matrix in oneDNN's packed layout."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedUnembed(Unembed):
    """The unembedding with its matrix in oneDNN's packed layout."""

    packed: Tensor

    def project(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        """Logits before the soft cap."""
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, None, "none", [], "")


class Compiled(Decoder):
    """A wrapper of a GPT for decoding, with a compiled one-token step. Prompts go through the uncompiled model.

    The step is compiled once for all lengths. It is compiled again only when the number of rows changes from one to
    several, or when rows get different lengths.

    Args:
        model: the model; must be in evaluation mode while it decodes.
        packs: let the compiler keep packed copies of the matrices, which do not follow changes of the model.
    """

    def __init__(self, model: GPT, packs: bool = False) -> None:
        super().__init__()
        self.model = model
        self.vocab_size, self.max_context = model.vocab_size, model.max_context
        self.new_cache, self.all_logits = model.new_cache, model.all_logits
        given: dict[str, Any] = {"options": {"freezing": True}} if packs else {}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            given["isolate_recompiles"] = True  # a recompilation limit of its own for each model in this process
        self.step = torch.compile(_step, fullgraph=True, **given)
        self.broken = False
        self.packed_from = _versions(model) if packs else None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """As `GPT.next_logits`; one token per row goes through the compiled step.

        Raises ConfigError if the packed copies of the matrices are no longer those of the model.
        """
        if self.packed_from is not None and self.packed_from != _versions(self.model):
            raise ConfigError("minigpt.fast: the model has changed since it was compiled; call minigpt.fast again")
        if self.broken or ids.shape[1] > 1 or cache.longest == 0:
            return self.model.next_logits(ids, cache, counts)
        step = self.model.trunk.begin(ids, cache)
        slots = torch.arange(step.width, device=ids.device)  # the only shape that changes between steps
        torch._dynamo.maybe_mark_dynamic(slots, 0)
        try:
            logits = self.step(self.model, ids, cache.keys, cache.values, cache.ids, step.positions, slots)
        except Exception as error:  # no compiler, or a kernel that does not compile: many exception types
            if "dynamo" not in type(error).__module__ and "inductor" not in type(error).__module__:
                raise
            self.broken = True
            notice(f"torch.compile does not work here ({type(error).__name__}); falling back to eager decoding")
            return self.model.next_logits(ids, cache, counts)
        cache.advance(step)
        return logits


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Changes with every change of a parameter, in place or not."""
    return [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in model.parameters()]


class _Slots(KVCache):
    """The part of a cache that the compiled step uses: only tensors, so that no Python int becomes a constant."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], ids: list[Tensor]) -> None:
        self.keys, self.values, self.ids = keys, values, ids

    @property
    def rows(self) -> int:
        """See `KVCache.rows`."""
        return self.ids[0].shape[0]

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """See `KVCache.append`."""
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
    # One query per row: if all rows have the same length, it attends to every slot and needs no mask.
    mask = None if positions.dim() == 1 else (slots <= positions[:, :, None])[:, None]  # (B, 1, 1, S)
    step = Step(positions, mask, False, slots.shape[0])
    cache = _Slots(keys, values, held)
    x = model.trunk.start(ids, step, cache)  # (B, 1, C)
    for block in model.trunk.blocks:
        x = block(x, step, cache)
    return model.unembed(model.trunk.norm(x)[:, -1])
