"""Exponential moving average of the weights, which is validated, saved and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minigpt.training.recipe.sharding import like, local


class Average:
    """An exponential moving average (Polyak & Juditsky 1992) of a model's parameters.

    After update n (from 1) the decay is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.

    Args:
        model: whose parameters; the average begins as a copy of them.
        decay: the part of the average that stays at each update.

    Attributes:
        updates: how many there were.
        tensors: the average by parameter name, or the raw weights while `swapped`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights in."""
        self.updates += 1
        part = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [local(parameter.detach()) for parameter in self.model.parameters()]
        torch._foreach_lerp_([local(tensor) for tensor in self.tensors.values()], parameters, part)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from averaged weights that were saved, by parameter name, after this many updates."""
        for name, tensor in self.tensors.items():
            tensor.copy_(like(tensors[name], tensor))
        self.updates = updates

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the model and the model's weights here; once more puts both back, to the bit."""
        for name, parameter in self.model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """For the length of a `with` block the model has the averaged weights, and `tensors` the raw ones."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
