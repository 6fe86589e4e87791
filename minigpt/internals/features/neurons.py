"""Neurons: contexts of maximum activation, and direct effect on the logits.

    found = study.top_contexts(("post", 1), k=10)          one pass over the run's validation split
    print(found.show(37))                                  top ten contexts of neuron 37
    print(study.neuron_effect(1, 37))                      tokens whose logits it raises and lowers

With `encode`, the same function works for features of a sparse autoencoder.
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
from minigpt.internals.access.linear import dividing
from minigpt.internals.access.names import Names
from minigpt.internals.access.result import Axis, Result
from minigpt.terminal import progress

AT_ONCE = 4096  # tokens per forward


@dataclass(repr=False)
class Contexts(Result):
    """The largest activations of every unit, (units, k), sorted in descending order, with their places in the text."""

    places: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    """(units, k): index of the token in the text; -1 if the text has fewer than k tokens."""
    tokens: Tokens | None = None
    study: Access | None = None
    width: int = 0
    """Width in tokens of the windows that the text was split into. Contexts do not cross window borders."""

    def context(self, unit: int, rank: int, before: int = 12, after: int = 4) -> tuple[str, str, str]:
        """Return the text before the token, the token, and the text after it, within the token's window."""
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
    """Find the k tokens of a text at which each unit of an activation is largest, with their contexts.

    It makes one pass over the text; memory is proportional to k values per unit, independent of the text's length.

    Args:
        study: the study of the model.
        at: the activation, such as ("post", 1): the neurons of block 1.
        k: number of tokens per unit.
        text: a text or token ids of any length; None: the validation split of the run's corpus.
        limit: maximum number of tokens.
        encode: maps the activation to the units: (B, T, ...) -> (B, T, units); None: the activation itself.

    Raises:
        ConfigError: no text is given and the study has no run, or the activation has no positions.
    """
    name = site_of(study, at)
    tokens, width = tokens_of(study, text), study.config.block_size
    if k < 1:
        raise ConfigError(f"k: {k} contexts; expected 1 or more")
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
    """Direct effect of a direction of the residual stream on the logits, without later blocks: (..., C) -> (..., V).

    It includes the centring and the weight of the final norm, but not its scale, which depends on the text, nor the
    logit soft cap: (direction - mean) * weight @ W_U.
    """
    unembed = study.model.unembed
    norm = dividing(study.model.trunk.norm, study.config, "direct effect on the logits")
    with torch.no_grad():
        if norm.centred:
            direction = direction - direction.mean(-1, keepdim=True)
        if norm.weight is not None:
            direction = direction * norm.weight
        return unembed.project(direction.to(unembed.weight))


def neuron_effect(study: Access, layer: int, neuron: int) -> Result:
    """Direct effect of a neuron with output 1 on the logits: W_out[n] W_U, scaled by the final norm's weight.

    `.top(10)` are the tokens whose logits it raises, `.top(10, smallest=True)` those it lowers, for a positive output
    (the output of a gated neuron can be negative). Effects through later blocks are not included.

    Raises ConfigError for an unknown layer or neuron.
    """
    blocks: Any = study.model.trunk.blocks
    if not -len(blocks) <= layer < len(blocks):
        raise ConfigError(f"layer {layer}: expected 0 .. {len(blocks) - 1}")
    weight = blocks[layer].mlp.down.weight  # (C, neurons)
    if not 0 <= neuron < weight.shape[1]:
        raise ConfigError(f"neuron {neuron}: expected 0 .. {weight.shape[1] - 1}")
    effect = direct_effect(study, weight[:, neuron].detach())
    return vocabulary_result(study, f"direct effect of neuron {neuron} of block {layer % len(blocks)}", effect)


def vocabulary_result(study: Access, title: str, values: Tensor) -> Result:
    """One value per token, (V)."""
    labels = [f"{id} {study.token(id)}" for id in range(len(values))]
    return Result(title, values.numpy(force=True), (Axis("token", labels),), "logits before the final norm's scale")
