"""What sampling needs of a model and its cache: two protocols.

A GPT implements them. So can a lookup table, an n-gram model, or a wrapper that combines several models; the wrapper's
cache then forwards each call to the inner caches.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from minigpt.errors import ConfigError


@runtime_checkable
class Cache(Protocol):
    """A model's state for the tokens it has read, such as a KV cache: token t of row b is in slot t."""

    @property
    def lengths(self) -> Tensor:
        """Number of tokens stored in each row: (B,) int64."""

    @property
    def longest(self) -> int:
        """The maximum of `lengths`, as a Python int."""

    @property
    def capacity(self) -> int:
        """Maximum number of tokens per row."""

    def truncate(self, lengths: Tensor) -> None:
        """Keep only the first lengths[b] tokens of row b; lengths: (B,) int64."""

    def gather(self, rows: Tensor, start: int = 0) -> None:
        """Make row i a copy of the previous row rows[i], from slot `start` on: select, repeat or reorder rows.

        Args:
            rows: (B',) int64 row indices; B' may differ from B only if start is 0.
            start: slots before it are identical and need no copying.
        """

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, keeping what is held."""


@runtime_checkable
class Decodable(Protocol):
    """A model that can be sampled from. It may also have a `device` (see `device_of`)."""

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 .. V-1."""

    @property
    def max_context(self) -> int:
        """Maximum context length in tokens."""

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Create an empty cache of `rows` rows with a capacity of `capacity` tokens each."""

    def next_logits(self, ids: Tensor, cache: Any, counts: Tensor | None = None) -> Tensor:
        """Read more tokens and predict the next one: (B, V) logits after each row's last token that is not padding.

        Args:
            ids: (B, T) int64, padded on the right.
            cache: from `new_cache`, with B rows; its lengths grow by `counts`.
            counts: (B,) int64, number of ids in each row that are not padding, at least 1; None: all T.
        """

    def all_logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """(B, T, V) logits after each of the (B, T) ids."""


def device_of(model: Decodable) -> torch.device:
    """The device of the model's inputs: its `device` attribute, else the CPU."""
    return torch.device(getattr(model, "device", "cpu"))


def as_decodable(model: Any) -> Decodable:
    """The model. Raises ConfigError if it cannot be sampled from."""
    missing = [name for name in ("vocab_size", "max_context", "new_cache", "next_logits") if not hasattr(model, name)]
    if not missing:
        return model
    kind = type(model).__name__
    if hasattr(model, "save_pretrained"):
        raise ConfigError(
            f"Sampler: {kind} is a model of transformers; save it with save_pretrained(FOLDER), the tokenizer too, and "
            "use Sampler.of(FOLDER)"
        )
    raise ConfigError(
        f"Sampler: {kind} has no {', '.join(missing)}; expected a GPT, what minigpt.load returns or takes, or a model "
        "with the methods of Decodable (docs/sampling.md)"
    )
