"""Read and edit the activations of a model, in single forward passes and during generation.

The model itself has no hooks: watched forward passes run its explicit twin (minigpt.model.explicit), plain ones never
do. So nothing has to be restored in the model, and a compiled copy is not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.checkpoint.identity import differences, probe
from minigpt.choices import Table
from minigpt.errors import ConfigError
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.names import Activation, Names, activations, select
from minigpt.internals.access.text import Text, Texts, need_two
from minigpt.model.cache import KVCache
from minigpt.model.explicit import explicit_forward, explicit_trunk
from minigpt.model.gpt import GPT
from minigpt.model.modes import evaluating
from minigpt.model.precision import widen
from minigpt.sampling.run import Run, load
from minigpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


class Site(NamedTuple):
    """The place of an activation, passed to an edit together with the activation."""

    name: str
    """Full name of the activation."""
    axes: tuple[str, ...]
    """Axes of the activation; see `minigpt.internals.access.names`."""
    positions: Tensor
    """Positions in the text: (T), or (B, T) if rows have different lengths."""

    @property
    def layer(self) -> int | None:
        """Index of the block; None for an activation outside the blocks."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None


ANALYSES = Table("analysis", "analysis", {})
"""Analyses of plug-ins: functions (study, text, **settings) -> Result.

Each is a method of `Study`, a verb of the command line, and, if its result has two axes, a heat map on the page.
"""

Edit = Callable[[Tensor, Site], Tensor | None]
Edits = Mapping[Any, "Edit | Tensor | float"]


class _Enough(Exception):
    """Stops the forward pass after the last requested activation."""


class Watch:
    """The hook of one forward pass: applies edits, then stores the requested activations."""

    def __init__(
        self, table: dict[str, Activation], edits: list[tuple[str, Edit]], keep: Sequence[str], stop: bool
    ) -> None:
        self.table = table
        self.edits: dict[str, list[Edit]] = {}
        for name, edit in edits:
            self.edits.setdefault(name, []).append(edit)
        self.keep, self.last = frozenset(keep), (keep[-1] if stop and keep else None)
        self.kept: dict[str, Tensor] = {}
        self.positions = torch.empty(0)

    def wants(self, name: str) -> bool:
        return name in self.edits or name in self.keep

    def __call__(self, name: str, activation: Tensor) -> Tensor:
        for edit in self.edits.get(name, ()):
            site = Site(name, self.table[name].axes, self.positions)
            own = activation.clone()  # an edit may change it in place, and other activations may share its memory
            changed = edit(own, site)
            changed = own if changed is None else changed
            if not isinstance(changed, Tensor) or changed.shape != activation.shape:
                got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                raise ConfigError(f"the edit at {name} returned {got}; expected a tensor {tuple(activation.shape)}")
            activation = changed.to(activation)
        if name in self.keep:
            if torch.is_grad_enabled():  # hook_resid_mid and hook_mlp_in are one tensor but need separate gradients
                activation = activation.view_as(activation)
                if not activation.requires_grad:  # in a frozen model the graph starts here
                    activation.requires_grad_()
            self.kept[name] = activation
        if name == self.last:
            raise _Enough
        return activation


def _refuse_another_function(model: GPT) -> None:
    """Raise ConfigError for a model with classes of its own whose explicit forward pass computes other logits.

    Its activations would be those of another model. Registered parts, and classes whose `explicit` agrees, pass.
    """
    if not (others := differences(model)):
        return
    ids, _ = probe(model.config, model.device)
    with evaluating(model), torch.no_grad():
        found, expected = explicit_forward(model, ids).double(), model(ids).double()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ConfigError(
            f"Study: the model has modules of other classes ({', '.join(others[:3])}), and its explicit forward pass "
            f"differs by {float((found - expected).abs().max()):.3g}; register the part instead (minigpt.register)"
        )


class Access(Texts):
    """Access to the activations of a model with its tokenizer.

    Args:
        run: a run or checkpoint folder, or the result of `minigpt.load`. See `Study.of` for a model in memory.

    A text is a string, several strings with the same number of tokens, or token ids (B, T) or (T). Strings get the
    tokenizer's prefix; token ids are used as given. Forward passes run in evaluation mode, without gradients unless
    requested; the mode, parameters and gradients of the model are not changed.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ANALYSES:
            return partial(ANALYSES[name], self)
        raise AttributeError(f"Study has no attribute {name!r}")

    def __init__(self, run: Run | str | Path) -> None:
        if isinstance(run, torch.nn.Module):
            raise ConfigError(f"Study: expected a run, got {type(run).__name__}; give a model to Study.of(model)")
        run = run if isinstance(run, Run) else load(run)
        self._open(run.model, run.tokenizer, run)

    @classmethod
    def of(cls, model: GPT, tokenizer: Tokenizer | None = None) -> Self:
        """A study of a model in memory. Without a tokenizer, texts must be token ids."""
        study = cls.__new__(cls)
        study._open(model, tokenizer, None)
        return study

    def _open(self, model: Any, tokenizer: Tokenizer | None, run: Run | None) -> None:
        model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
        if not isinstance(model, GPT):
            raise ConfigError(f"Study: expected a minigpt.GPT, got {type(model).__name__}; give the model itself")
        _refuse_another_function(model)
        super().__init__(model, tokenizer)
        self.run = run
        self.table = activations(model.config)
        self._edits: list[tuple[str, Edit]] = []

    # Reading and editing.

    @contextmanager
    def hooks(self, edits: Edits) -> Iterator[Self]:
        """Edit activations in every forward pass within this `with` block, including generation.

        Args:
            edits: a name, pattern or (short name, layer) -> a function (activation, site) that returns the new
                activation (or None if it modified its argument), or a tensor or number that replaces the activation.

        Blocks nest: inner edits run after outer ones. Raises ConfigError with a suggestion for an unknown name.
        """
        added: list[tuple[str, Edit]] = []
        for names, edit in edits.items():
            made = edit if callable(edit) else _constant(edit)
            added += [(name, made) for name in select(self.config, names)]
        before = self._edits
        self._edits = [*before, *added]
        try:
            yield self
        finally:
            self._edits = before

    def watch(self, keep: Sequence[str] = (), stop: bool = False) -> Watch:
        """The hook of a forward pass: the edits of active `hooks`, and the full names to store.

        Raises ConfigError for an edit of a norm that is not computed: if heads read the stream separately, there is no
        single norm before attention.
        """
        watch = Watch(self.table, self._edits, keep, stop)
        for name in watch.edits:
            block, norm, _ = name.partition("ln1.")
            reads = [f"{block}hook_{letter}_input" for letter in "qkv"] if norm else []
            for read in filter(watch.wants, reads):
                raise ConfigError(f"edit of {name}: has no effect together with {read}; edit or keep only one of them")
        return watch

    def forward(self, ids: Tensor, cache: KVCache | None = None, watch: Watch | None = None) -> Tensor:
        """Normed hidden states (B, T, C) of ids (B, T) by the explicit forward, with the edits of active `hooks`."""
        watch = watch or self.watch()
        offsets = torch.arange(ids.shape[1], device=ids.device)
        if cache is None or cache.even:
            watch.positions = offsets + (cache.longest if cache is not None else 0)
        else:
            watch.positions = cache.lengths[:, None] + offsets
        return explicit_trunk(self.model.trunk, ids, cache, watch)

    @contextmanager
    def running(self, grad: bool = False) -> Iterator[None]:
        """Evaluation mode, with or without gradients, within a `with` block."""
        with evaluating(self.model), torch.set_grad_enabled(grad):
            yield

    def run_with_cache(
        self,
        text: Text,
        names: Names | None = None,
        *,
        positions: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        stop: bool = False,
        grad: bool = False,
    ) -> tuple[Tensor, Activations]:
        """Logits (B, T, V) and activations of one forward pass.

        Args:
            text: see the class.
            names: activations to store (see `names.select`); None: all except those on request.
            positions: positions to store (of an attention pattern: queries); None: all.
            device: device to store them on; None: the model's.
            stop: stop after the last requested activation; the logits are then empty (B, 0, V).
            grad: keep the autograd graph.
        """
        ids, keep = self.ids(text), select(self.config, names)
        watch = self.watch(keep, stop)
        where = _positions(positions, ids.shape[1])
        with self.running(grad):
            try:
                logits = self.model.unembed(self.forward(ids, watch=watch))
            except _Enough:
                logits = self.model.unembed.weight.new_empty(len(ids), 0, self.model.vocab_size)
            kept = {name: self._part(name, value, where, device) for name, value in watch.kept.items()}
        return logits, Activations(self.config, kept, where)

    def _part(self, name: str, value: Tensor, positions: list[int] | None, device: Any) -> Tensor:
        if positions is not None:
            axis = self.table[name].axes.index("pos")
            value = value.index_select(axis, torch.tensor(positions, device=value.device))
        return value if device is None else value.to(device)

    def logits(self, text: Text, *, grad: bool = False) -> Tensor:
        """Logits (B, T, V), with the edits of active `hooks`."""
        ids = self.ids(text)
        with self.running(grad):
            return self.model.unembed(self.forward(ids))

    def losses(self, text: Text, *, grad: bool = False) -> Tensor:
        """Loss of each token except the first, in nats, (B, T - 1)."""
        ids = self.ids(text)
        need_two(ids.shape[1])
        return token_losses(self.logits(ids, grad=grad), ids)

    def loss(self, text: Text) -> float:
        """Mean loss in nats per token, over all tokens except the first of each row."""
        return float(self.losses(text).mean())

    def gradients(
        self, text: Text, metric: Callable[[Tensor], Tensor], names: Names | None = None
    ) -> tuple[Tensor, Activations, Activations]:
        """A scalar function of the logits: its value, the activations, and its gradients with respect to them.

        Args:
            text: see the class.
            metric: logits (B, T, V) -> a scalar; a sum over rows keeps the gradients of rows separate.
            names: as in `run_with_cache`; an activation that the value does not depend on has gradient 0.
        """
        logits, cache = self.run_with_cache(text, names, grad=True)
        with torch.enable_grad():
            value = metric(logits)
        made = list(cache.values_by_name.values())
        gradients = torch.autograd.grad(value, made, allow_unused=True)
        by_name = {
            name: torch.zeros_like(activation) if gradient is None else gradient
            for name, activation, gradient in zip(cache, made, gradients, strict=True)
        }
        detached = {name: activation.detach() for name, activation in cache.values_by_name.items()}
        return value.detach(), Activations(self.config, detached), Activations(self.config, by_name)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss of each id except the first, in nats, (B, T - 1), from logits (B, T, V)."""
    return F.cross_entropy(widen(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )


def _constant(value: Any) -> Edit:
    def edit(activation: Tensor, site: Site) -> Tensor:
        return torch.as_tensor(value, dtype=activation.dtype, device=activation.device).expand_as(activation)

    return edit


def _positions(positions: Sequence[int] | None, length: int) -> list[int] | None:
    if positions is None:
        return None
    wrong = [position for position in positions if not -length <= position < length]
    if wrong:
        raise ConfigError(f"positions: {wrong[0]} is outside the text; expected {-length} .. {length - 1}")
    return [position % length for position in positions]
