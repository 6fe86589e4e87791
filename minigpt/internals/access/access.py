"""What every analysis needs of a model under study: to see any activation and to change any, alone or while it writes.

The model itself gains no method and no hook: a watched run goes through the explicit twin of its forward
(minigpt.model.explicit), a plain one never does. So there is nothing to restore in the model, and a compiled callable
beside it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.checkpoint.checkpoint import Run, load
from minigpt.errors import ConfigError
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.names import Activation, Names, activations, select
from minigpt.internals.access.text import Text, Texts, need_two
from minigpt.model.cache import KVCache
from minigpt.model.explicit import explicit_trunk
from minigpt.model.gpt import GPT
from minigpt.model.layers import widen
from minigpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self


class Site(NamedTuple):
    """Where an edit stands: what it is called with beside the activation."""

    name: str
    """The activation's full name."""
    axes: tuple[str, ...]
    """The activation's axes; see `minigpt.internals.access.names`."""
    positions: Tensor
    """Where in the text the activation's positions are: (T), or (B, T) where rows stand at different lengths."""

    @property
    def layer(self) -> int | None:
        """The block's number; None for an activation of the whole model."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None


Edit = Callable[[Tensor, Site], Tensor | None]
Edits = Mapping[Any, "Edit | Tensor | float"]


class _Enough(Exception):
    """The last activation asked for has been seen."""


class Watch:
    """The tap of one run: applies the edits, then keeps what is asked for."""

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
            own = activation.clone()  # an edit may write into it, and other activations may share its memory
            changed = edit(own, site)
            changed = own if changed is None else changed
            if not isinstance(changed, Tensor) or changed.shape != activation.shape:
                got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                raise ConfigError(f"the edit at {name} returned {got}; expected a tensor {tuple(activation.shape)}")
            activation = changed.to(activation)
        if name in self.keep:
            if torch.is_grad_enabled():  # hook_resid_mid and hook_mlp_in are one tensor, and two to differentiate by
                activation = activation.view_as(activation)
                if not activation.requires_grad:  # a frozen model: the graph begins here
                    activation.requires_grad_()
            self.kept[name] = activation
        if name == self.last:
            raise _Enough
        return activation


class Access(Texts):
    """A model and its tokenizer, opened up.

    Args:
        run: a run or checkpoint folder, or what `minigpt.load` returned. `Study.of(model, tokenizer)` takes the parts.

    Texts are given as text, as several of the same number of tokens, or as token ids (B, T) or (T). A text begins with
    what its tokenizer puts in front of one; token ids are taken as they are. Runs are made in evaluation mode and
    without gradients unless asked for; the model's mode, parameters and their gradients stay as they were.
    """

    def __init__(self, run: Run | str | Path) -> None:
        if isinstance(run, torch.nn.Module):
            raise ConfigError(f"Study: expected a run, got {type(run).__name__}; give a model to Study.of(model)")
        run = run if isinstance(run, Run) else load(run)
        self._open(run.model, run.tokenizer, run)

    @classmethod
    def of(cls, model: GPT, tokenizer: Tokenizer | None = None) -> Self:
        """A study of a model that is in memory. Without a tokenizer texts are token ids only."""
        study = cls.__new__(cls)
        study._open(model, tokenizer, None)
        return study

    def _open(self, model: Any, tokenizer: Tokenizer | None, run: Run | None) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper is left aside
        if not isinstance(model, GPT):
            raise ConfigError(f"Study: expected a minigpt.GPT, got {type(model).__name__}; give the model itself")
        super().__init__(model, tokenizer)
        self.run = run
        self.table = activations(model.config)
        self._edits: list[tuple[str, Edit]] = []

    # Seeing and changing.

    @contextmanager
    def hooks(self, edits: Edits) -> Iterator[Self]:
        """Change activations in every run of this `with` block, generation included; before and after it nothing is.

        Args:
            edits: a name, pattern or (short name, layer) -> a function (activation, site) that returns what the
                computation goes on with (or None where it wrote into its argument), or the tensor or number itself.

        Blocks nest: the inner edits come after the outer ones. Raises ConfigError, naming the nearest, for an unknown
        name.
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
        """The tap of a run to come: the edits of the open `hooks`, and the full names to keep.

        Raises ConfigError for an edit of a norm that the run does not compute: where heads read the stream each by
        itself, there is no one norm before attention.
        """
        watch = Watch(self.table, self._edits, keep, stop)
        for name in watch.edits:
            block, norm, _ = name.partition("ln1.")
            reads = [f"{block}hook_{letter}_input" for letter in "qkv"] if norm else []
            for read in filter(watch.wants, reads):
                raise ConfigError(f"the edit at {name}: would change nothing beside {read}; edit or keep one of them")
        return watch

    def forward(self, ids: Tensor, cache: KVCache | None = None, watch: Watch | None = None) -> Tensor:
        """Normed hidden states (B, T, C) of ids (B, T), with the edits of the open `hooks`, by the explicit forward."""
        watch = watch or self.watch()
        offsets = torch.arange(ids.shape[1], device=ids.device)
        if cache is None or cache.even:
            watch.positions = offsets + (cache.longest if cache is not None else 0)
        else:
            watch.positions = cache.lengths[:, None] + offsets
        return explicit_trunk(self.model.trunk, ids, cache, watch)

    @contextmanager
    def running(self, grad: bool = False) -> Iterator[None]:
        """Evaluation mode, with or without gradients, for the length of a `with` block."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.set_grad_enabled(grad):
                yield
        finally:
            for module in training:
                module.training = True

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
        """Logits (B, T, V) and activations of one forward.

        Args:
            text: see the class.
            names: which activations to keep (see `names.select`); None: all that are computed anyway.
            positions: keep these positions of each (of an attention pattern: these queries); None: all.
            device: where to keep them; None: where they are.
            stop: end the forward once the last of them is there; the logits are then empty (B, 0, V).
            grad: keep the graph, so that what is returned can be differentiated.
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
        """Logits (B, T, V), with the edits of the open `hooks`."""
        ids = self.ids(text)
        with self.running(grad):
            return self.model.unembed(self.forward(ids))

    def losses(self, text: Text, *, grad: bool = False) -> Tensor:
        """Nats that each token but the first costs after those before it, (B, T - 1)."""
        ids = self.ids(text)
        need_two(ids.shape[1])
        return token_losses(self.logits(ids, grad=grad), ids)

    def loss(self, text: Text) -> float:
        """Mean nats per token, over every token but each row's first."""
        return float(self.losses(text).mean())

    def gradients(
        self, text: Text, metric: Callable[[Tensor], Tensor], names: Names | None = None
    ) -> tuple[Tensor, Activations, Activations]:
        """What a number made of the logits depends on: its value, activations, and its gradients by them.

        Args:
            text: see the class.
            metric: logits (B, T, V) -> a scalar; a sum over rows keeps the rows' gradients apart.
            names: as in `run_with_cache`; an activation that the number does not depend on has gradient 0.
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
    """Nats of each id after those before it, (B, T - 1), from the logits (B, T, V) at each."""
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
        raise ConfigError(f"positions: {wrong[0]} is none of the text's {length}; expected {-length} .. {length - 1}")
    return [position % length for position in positions]
