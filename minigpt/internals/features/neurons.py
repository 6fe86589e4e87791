"""Neurons: contexts of maximum activation, and direct effect on the logits.

    found = study.top_contexts(("post", 1), k=10)          one pass over the run's validation split
    print(found.show(37))                                  neuron 37's ten strongest contexts
    print(study.neuron_effect(1, 37))                      the tokens that it raises and lowers

The same pass serves the features of a sparse autoencoder: `encode` turns an activation into theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import Tokens, site_of, tokens_of, windows
from minigpt.internals.access.names import Names
from minigpt.internals.access.result import Axis, Result
from minigpt.model.layers import LayerNorm
from minigpt.terminal import progress

AT_ONCE = 4096  # tokens per forward


@dataclass(repr=False)
class Contexts(Result):
    """The greatest activations of every unit, (units, k), greatest first, and where in the text they are."""

    places: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    """(units, k) the token's number in the text; -1 where the text is shorter than k tokens."""
    tokens: Tokens | None = None
    study: Access | None = None
    width: int = 0
    """Tokens of the windows that the text was read in: no context reaches over a window's border."""

    def context(self, unit: int, rank: int, before: int = 12, after: int = 4) -> tuple[str, str, str]:
        """The text before the token, the token, and the text after it; the model saw nothing before the window."""
        assert self.tokens is not None and self.study is not None
        place = int(self.places[unit, rank])
        window = place // self.width * self.width
        first = max(window, place - before)
        last = min(window + self.width, place + 1 + after, len(self.tokens))
        ids = self.tokens.read(np.array([first]), last - first)[0].tolist()
        pieces = [self.study.token(id) for id in ids]
        here = place - first
        return "".join(pieces[:here]), pieces[here], "".join(pieces[here + 1 :])

    def show(self, unit: int, before: int = 30, after: int = 8) -> str:
        """One unit's contexts, one per line, the token between brackets."""
        lines = [f"{self.axes[0].name} {self.axes[0].labels[unit]} in {self.title.removeprefix('top contexts of ')}"]
        for rank in range(self.values.shape[1]):
            if self.places[unit, rank] < 0:
                continue
            left, token, right = (repr(part)[1:-1] for part in self.context(unit, rank, before, after))
            lines.append(f"  {self.values[unit, rank]:8.3f}  {left[-before:]:>{before}}[{token}]{right[:after]}")
        return "\n".join(lines)


def top_contexts(
    study: Access,
    at: Names,
    k: int = 10,
    *,
    text: str | Sequence[int] | Tensor | Tokens | None = None,
    limit: int | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Contexts:
    """The k tokens of a text at which each unit of an activation is greatest, with their contexts.

    One pass, in memory for k values a unit however long the text is.

    Args:
        study: whose model reads.
        at: the activation, such as ("post", 1): the neurons of block 1.
        k: how many tokens a unit.
        text: a text or token ids of any length; None: the validation split of the run's own corpus.
        limit: read this many tokens at most.
        encode: what to look at instead of the activation itself: (B, T, ...) -> (B, T, units).

    Raises:
        ConfigError: no text, but no run either; or an activation that is not one with positions.
    """
    name = site_of(study, at)
    tokens, width = tokens_of(study, text), study.config.block_size
    if k < 1:
        raise ConfigError(f"k: {k} is no number of contexts; give 1 or more")
    total = len(tokens) if limit is None else min(limit, len(tokens))
    best, places = torch.empty(0), torch.empty(0, dtype=torch.int64)
    with progress("reading", total, "tokens") as bar:
        for first, ids in windows(tokens, width, max(1, AT_ONCE // width), limit):
            _, cache = study.run_with_cache(ids, [name], stop=True)
            found = cache[name] if encode is None else encode(cache[name])
            units = found.flatten(0, 1).flatten(1).T.cpu()  # (units, B T)
            number = torch.arange(first, first + ids.numel()).expand(len(units), -1)
            if best.numel():
                units, number = torch.cat((best, units), 1), torch.cat((places, number), 1)
            best, order = units.topk(min(k, units.shape[1]), 1)
            places = number.gather(1, order)
            bar.update(first + ids.numel())
    axes = (
        Axis("neuron" if name.endswith("mlp.hook_post") else "unit", [str(i) for i in range(len(best))]),
        Axis("rank", [str(i + 1) for i in range(best.shape[1])]),
    )
    title = f"top contexts of {name}"
    return Contexts(title, best.numpy(), axes, "", {"tokens": total}, places.numpy(), tokens, study, width)


def direct_effect(study: Access, direction: Tensor) -> Tensor:
    """What a direction of the stream does to the logits by itself, without any later block: (..., C) -> (..., V).

    The final norm's own scale, which depends on the text, is left out; its centring and its weight are not, nor is a
    logit cap applied: (direction - mean) * weight @ W_U, per unit of length, before the division.
    """
    norm, unembed = study.model.trunk.norm, study.model.unembed
    with torch.no_grad():
        if isinstance(norm, LayerNorm):
            direction = direction - direction.mean(-1, keepdim=True)
        if norm.weight is not None:
            direction = direction * norm.weight
        return unembed.project(direction.to(unembed.weight))


def neuron_effect(study: Access, layer: int, neuron: int) -> Result:
    """What one neuron's output, when it is 1, adds to the logits directly: W_out[n] W_U, by the final norm's weight.

    `.top(10)` are the tokens that it raises, `.top(10, smallest=True)` those that it lowers (where its output is
    positive, which that of a gated neuron need not be). What later blocks make of the neuron is not in it.

    Raises ConfigError where there is no such layer or neuron.
    """
    blocks: Any = study.model.trunk.blocks
    if not -len(blocks) <= layer < len(blocks):
        raise ConfigError(f"layer {layer}: the model's are 0 .. {len(blocks) - 1}")
    weight = blocks[layer].mlp.down.weight  # (C, neurons)
    if not 0 <= neuron < weight.shape[1]:
        raise ConfigError(f"neuron {neuron}: a block's are 0 .. {weight.shape[1] - 1}")
    effect = direct_effect(study, weight[:, neuron].detach())
    return vocabulary_result(study, f"direct effect of neuron {neuron} of block {layer % len(blocks)}", effect)


def vocabulary_result(study: Access, title: str, values: Tensor) -> Result:
    """One value per token, (V)."""
    labels = [f"{id} {study.token(id)}" for id in range(len(values))]
    return Result(title, values.numpy(force=True), (Axis("token", labels),), "logits before the final norm's scale")
