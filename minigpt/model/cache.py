"""The key/value cache.

Token t of row b is always stored in slot t. Rows may hold different numbers of tokens: unequal prompts are padded on
the right, the causal mask hides the padding, and `truncate` then sets the true lengths. The next tokens overwrite the
padding.

    step = cache.begin(T)                     positions and mask of the T tokens to come
    keys, values = cache.append(0, k, v, step)    once per layer
    cache.advance(step)                       only now do the lengths grow: an exception in between changes nothing
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.errors import ConfigError


class Step(NamedTuple):
    """Positions and attention mask of one forward pass. Without a cache: positions 0..T-1 and the causal kernel."""

    positions: Tensor  # (T) if all rows have the same length, else (B, T)
    mask: (
        Tensor | None
    )  # (B or 1, 1, T, S) True = may attend; None: causal from slot 0, or a single query that attends to all slots
    causal: bool  # use the kernel's causal mask (aligned top-left, so only valid while the cache is empty)
    width: int  # S: slots that attention reads


def causal_step(length: int, device: torch.device) -> Step:
    """Return the Step for `length` tokens without a cache."""
    return Step(torch.arange(length, device=device), None, length > 1, length)


class KVCache:
    """Preallocated keys and values of every layer, each (B, G, S, D).

    Args:
        n_layer: number of layers.
        rows: B, the number of independent sequences.
        heads: G, the number of key/value heads.
        capacity: S, the maximum number of tokens in a row.
        head_dim: D, the head width.
    """

    def __init__(
        self,
        n_layer: int,
        rows: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (rows, heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.ids = [
            torch.zeros((rows, 1, capacity, 1), dtype=torch.int64, device=device)
        ]  # same layout as a layer's keys
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B) tokens in each row
        self.longest = 0  # max(lengths) as a Python int, to avoid a device synchronization
        self.even = True  # whether every row holds `longest` tokens

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """S, the maximum number of tokens in a row."""
        return self.keys[0].shape[2]

    def begin(self, length: int) -> Step:
        """Positions and mask of the `length` tokens per row that come next. Raises ConfigError past the capacity."""
        if self.longest + length > self.capacity:
            raise ConfigError(
                f"cache: {self.longest} cached and {length} new tokens exceed its capacity ({self.capacity})"
            )
        width = self.longest + length
        offsets = torch.arange(length, device=self.lengths.device)
        if self.even:
            positions = offsets + self.longest  # (T)
            if self.longest == 0 or length == 1:
                return Step(positions, None, length > 1, width)
            seen = torch.arange(width, device=offsets.device) <= positions[:, None]  # (T, S)
            return Step(positions, seen[None, None], False, width)
        positions = self.lengths[:, None] + offsets  # (B, T)
        seen = torch.arange(width, device=offsets.device) <= positions[:, :, None]  # (B, T, S)
        return Step(positions, seen[:, None], False, width)

    def history(self, ids: Tensor, step: Step, n: int) -> Tensor:
        """Store the new token ids (B, T); return each with the n - 1 ids before it, newest first, (B, T, n).

        -1 stands for positions before the first token.
        """
        slots = step.positions.expand(self.rows, -1)  # (B, T)
        held = self.ids[0][:, 0, :, 0]  # (B, S)
        held.scatter_(1, slots, ids)
        before = slots[..., None] - torch.arange(n, device=slots.device)  # (B, T, n)
        found = held.gather(1, before.clamp(min=0).flatten(1)).view_as(before)
        return found.masked_fill(before < 0, -1)

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, G, T, D) of a layer; return all cached ones, each (B, G, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if step.positions.dim() == 1:
            begin = step.width - k.shape[2]
            keys[:, :, begin : step.width] = k
            values[:, :, begin : step.width] = v
        else:
            rows = torch.arange(self.rows, device=keys.device)[:, None]  # (B, 1) broadcasts with the slots (B, T)
            keys[rows, :, step.positions] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, step.positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : step.width], values[:, :, : step.width]

    def advance(self, step: Step) -> None:
        """Complete the step: add its tokens to the lengths."""
        length = step.positions.shape[-1]
        self.lengths = self.lengths + length
        self.longest += length

    def truncate(self, lengths: Tensor) -> None:
        """Keep the first lengths[b] tokens of row b. The next tokens overwrite the slots beyond."""
        plain, held = lengths.tolist(), self.lengths.tolist()
        if len(plain) != self.rows or any(not 0 <= new <= old for new, old in zip(plain, held, strict=False)):
            raise ConfigError(f"cache: rows of {held} tokens cannot be truncated to {plain}")
        self.lengths = lengths.to(self.lengths.device, torch.int64, copy=True)
        self.longest = max(plain, default=0)
        self.even = len(set(plain)) <= 1

    def gather(self, rows: Tensor, start: int = 0) -> None:
        """Replace row i by row rows[i]: select, repeat or reorder. `rows` (B') may change the number of rows.

        Rows that keep their place are not copied.

        Args:
            rows: (B') indices of the source rows.
            start: first slot to copy. Before it, row i and row rows[i] must hold the same tokens (beams share most of
                their past). Only valid if the number of rows does not change.
        """
        rows = rows.to(self.lengths.device)
        count = len(rows)
        if start and count != self.rows:
            raise ConfigError(f"cache: gather from slot {start} needs {self.rows} row indices, got {count}")
        if count <= self.rows:
            # Copy only the rows that change: dropping a row costs at most one copy, unmoved beams cost nothing.
            moved = (rows != torch.arange(count, device=rows.device)).nonzero().squeeze(1)
            source = rows[moved]
        for tensors in (self.keys, self.values, self.ids):
            for layer, tensor in enumerate(tensors):
                if count > self.rows:
                    tensors[layer] = tensor.new_zeros(count, *tensor.shape[1:])
                    tensors[layer][:, :, : self.longest] = tensor[rows, :, : self.longest]
                    continue
                if len(moved):
                    tensor[moved, :, start : self.longest] = tensor[source, :, start : self.longest]
                tensor = tensor[:count]
                # Free the memory of dropped rows once they are half of it, so that each row is copied at most once.
                halved = tensor.untyped_storage().nbytes() >= 2 * tensor.numel() * tensor.element_size()
                tensors[layer] = tensor.clone() if halved else tensor
        self.lengths = self.lengths[rows]
        plain = self.lengths.tolist()
        self.longest = max(plain, default=0)
        self.even = len(set(plain)) <= 1

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row; what is held stays."""
        extra = capacity - self.capacity
        if extra <= 0:
            return
        for tensors in (self.keys, self.values, self.ids):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = torch.nn.functional.pad(tensor, (0, 0, 0, extra))
