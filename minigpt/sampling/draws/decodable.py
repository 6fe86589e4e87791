"""What sampling needs of a model and its cache: two protocols.

A GPT fulfils them; so do a table, an n-gram model, and a wrapper that combines several models (its cache then passes
each verb on to the caches inside).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """What a model remembers of the tokens it has read: row b's token t lies in slot t."""

    @property
    def lengths(self) -> Tensor:
        """Tokens held in each row: (B,) int64."""

    @property
    def longest(self) -> int:
        """The greatest of `lengths`, as a plain int."""

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first lengths[b] tokens of row b; lengths: (B,) int64."""

    def gather(self, rows: Tensor, start: int = 0) -> None:
        """Make row i a copy of the former row rows[i], from slot `start` on: select, repeat or reorder.

        Args:
            rows: (B',) int64 row numbers; B' may differ from B only when start is 0.
            start: slots before it are known to agree and need no copying.
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
        """The most tokens that the model can look at."""

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache of `rows` rows with room for `capacity` tokens each."""

    def next_logits(self, ids: Tensor, cache: Any, counts: Tensor | None = None) -> Tensor:
        """Read further tokens and predict the next: (B, V) logits after each row's last real token.

        Args:
            ids: (B, T) int64, right-padded.
            cache: from `new_cache`, with B rows; its lengths grow by `counts`.
            counts: (B,) int64, how many of row b's T ids are real, at least 1; None: all of them.
        """

    def all_logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """(B, T, V) logits after each of the (B, T) ids."""


def device_of(model: Decodable) -> torch.device:
    """Where the model reads its ids: its `device` attribute, else the CPU."""
    return torch.device(getattr(model, "device", "cpu"))
