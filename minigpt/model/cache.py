"""The key/value cache.

Row b's token t always sits in slot t. Rows may hold different numbers of tokens: unequal prompts are padded on the
right, causality hides the padding, and `truncate` then sets the true lengths; the next tokens overwrite it.

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
    """Where the tokens of one forward go. Without a cache: positions 0..T-1 and the causal kernel."""

    positions: Tensor  # (T) where every row stands at the same length, else (B, T)
    mask: (
        Tensor | None
    )  # (B or 1, 1, T, S) True = may attend; None: causal from the first slot, or one query that sees all
    causal: bool  # the kernel's own causal mask does (aligned top-left, so only while the cache is empty)
    width: int  # S: slots that attention looks at


def causal_step(length: int, device: torch.device) -> Step:
    """The step of `length` tokens without a cache."""
    return Step(torch.arange(length, device=device), None, length > 1, length)


class KVCache:
    """Preallocated keys and values of every layer, each (B, G, S, D).

    Args:
        n_layer: layers.
        rows: B, independent sequences.
        heads: G, key/value heads.
        capacity: S, the most tokens a row can hold.
        head_dim: D.
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
        self.ids = [torch.zeros((rows, 1, capacity, 1), dtype=torch.int64, device=device)]  # shaped as a layer's keys
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B) tokens each row holds
        self.longest = 0  # max(lengths), as a plain number: no device is asked for it
        self.even = True  # every row holds `longest` tokens

    @property
    def rows(self) -> int:
        """B: how many sequences it holds."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """S: how many tokens a row can hold."""
        return self.keys[0].shape[2]

    def begin(self, length: int) -> Step:
        """Positions and mask of the `length` tokens per row that come next. Raises ConfigError past the capacity."""
        if self.longest + length > self.capacity:
            raise ConfigError(
                f"cache: {self.longest} tokens held and {length} new ones exceed its capacity ({self.capacity})"
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
        """Store the ids (B, T) of the tokens to come; return each with the n - 1 before it, newest first, (B, T, n).

        Where there is none before, -1 stands for it.
        """
        slots = step.positions.expand(self.rows, -1)  # (B, T)
        held = self.ids[0][:, 0, :, 0]  # (B, S)
        held.scatter_(1, slots, ids)
        before = slots[..., None] - torch.arange(n, device=slots.device)  # (B, T, n)
        found = held.gather(1, before.clamp(min=0).flatten(1)).view_as(before)
        return found.masked_fill(before < 0, -1)

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, G, T, D); return all that are held, each (B, G, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if step.positions.dim() == 1:
            begin = step.width - k.shape[2]
            keys[:, :, begin : step.width] = k
            values[:, :, begin : step.width] = v
        else:
            rows = torch.arange(self.rows, device=keys.device)[:, None]  # (B, 1) beside the slots (B, T)
            keys[rows, :, step.positions] = k.transpose(1, 2).to(keys.dtype)
            values[rows, :, step.positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : step.width], values[:, :, : step.width]

    def advance(self, step: Step) -> None:
        """The step is done: its tokens now count as held."""
        length = step.positions.shape[-1]
        self.lengths = self.lengths + length
        self.longest += length

    def truncate(self, lengths: Tensor) -> None:
        """Keep the first lengths[b] tokens of row b (B). Slots beyond are overwritten by what comes next."""
        plain, held = lengths.tolist(), self.lengths.tolist()
        if len(plain) != self.rows or any(not 0 <= new <= old for new, old in zip(plain, held, strict=False)):
            raise ConfigError(f"cache: rows of {held} tokens cannot be truncated to {plain}")
        self.lengths = lengths.to(self.lengths.device, torch.int64, copy=True)
        self.longest = max(plain, default=0)
        self.even = len(set(plain)) <= 1

    def gather(self, rows: Tensor, start: int = 0) -> None:
        """Row i becomes what row rows[i] was: select, repeat or reorder. `rows` (B') may change the number of rows.

        `start` says that row i and row rows[i] hold the same tokens before that slot, so that only later slots are
        copied (beams share most of their past). It needs as many rows as there were. Rows that stay where they are
        are not copied at all.
        """
        rows = rows.to(self.lengths.device)
        count = len(rows)
        if start and count != self.rows:
            raise ConfigError(f"cache: gather from slot {start} keeps {self.rows} rows, but {count} were asked for")
        if count <= self.rows:
            # Only rows that change are copied: dropping one costs at most a row, and beams that stay cost nothing.
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
                # Rows that have gone give their memory back when they are half of it: so each is copied at most once.
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
