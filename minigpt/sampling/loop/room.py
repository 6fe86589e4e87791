"""How many rows fit in memory, measured on the model's own cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minigpt.model.device import free_bytes
from minigpt.sampling.draws.decodable import Decodable, device_of

MOST_ROWS = 256  # in one batch; more are not faster
SHARE = 0.4  # of the free memory; the rest is for copies while rows move, and for what the estimate leaves out
NUMBERS_PER_TOKEN = 24  # float32 numbers of a row's vocabulary while a token is chosen
WIDTHS_PER_TOKEN = 40  # numbers of a token's activations while a prompt is read, as a multiple of the model's width


class Room:
    """The memory that rows may take.

    Args:
        model: the model that decodes.
        limit: bytes; None for a share of what is free.
    """

    def __init__(self, model: Decodable, limit: int | None = None) -> None:
        self.model = model
        inner: Any = getattr(model, "model", getattr(model, "study", model))  # of a wrapper
        self.width = getattr(getattr(inner, "config", None), "n_embd", 0)
        if limit is None:
            free = free_bytes(device_of(model))
            limit = None if free is None else int(free * SHARE)
        self.limit = limit
        self._costs: dict[int, int] = {}

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether so many rows of so many tokens, prompts included, can be generated together. One row always can."""
        if rows <= 1:
            return True
        return rows <= MOST_ROWS and (self.limit is None or rows * self.row_bytes(tokens) <= self.limit)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of a row of so many tokens: its cache, the activations of its prompt, its logits."""
        slots = max(1, min(tokens, self.model.max_context))
        if slots not in self._costs:
            with torch.no_grad():
                cache = _bytes(self.model.new_cache(1, slots))
            numbers = WIDTHS_PER_TOKEN * self.width * slots + NUMBERS_PER_TOKEN * self.model.vocab_size
            self._costs[slots] = cache + 4 * numbers
        return self._costs[slots] + 16 * tokens


def _bytes(thing: Any, depth: int = 3) -> int:
    """Bytes of the tensors in an object, its attributes, lists and dicts."""
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    if not depth:
        return 0
    if isinstance(thing, (list, tuple)):
        return sum(_bytes(part, depth - 1) for part in thing)
    inside = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    return sum(_bytes(part, depth - 1) for part in inside.values())
