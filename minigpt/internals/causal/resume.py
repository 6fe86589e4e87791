"""Run a forward pass from the middle: many small edits without a whole forward pass for each.

A change of the stream at one position and layer does not affect earlier layers, nor earlier positions in any layer. So
one base run is made, and each change only recomputes the later layers, from its position on:

    layer 3   . . . x x x      x computed for this change
    layer 2   . . . x x x      . keys and values of the base run, from a cache
    layer 1   . . . C - -      C changed    - base run
    layer 0   - - - - - -

Changes with the same start position form a batch; each change joins the batch at its layer. The recomputation uses the
model's regular blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.internals.access.access import Access
from minigpt.internals.access.names import Names
from minigpt.model.attention import Attention
from minigpt.model.cache import KVCache, Step
from minigpt.model.gpt import Block

TOKENS = 4096  # tokens per batch, over all rows: large enough for full speed, small enough to fit in memory


class Change(NamedTuple):
    """New values of the residual stream at some positions of one layer."""

    layer: int
    """Index of the block; -1 with half "post": before the first block."""
    half: Literal["mid", "post"]
    """mid: between attention and MLP of the block; post: after the block."""
    start: int
    """First changed position."""
    stream: Tensor
    """(B, n, C): new stream at positions start .. start + n - 1."""


class Base:
    """The base run that changes are applied to.

    Args:
        study: the study of the model; active edits are ignored.
        ids: token ids (B, T).
        names: activations to keep in `seen`, in addition to the stream.
    """

    def __init__(self, study: Access, ids: Tensor, names: Names = ()) -> None:
        self.model, self.ids = study.model, ids
        names = [names] if isinstance(names, str) else list(names)  # type: ignore[arg-type]
        logits, self.seen = study.run_with_cache(ids, [("resid_pre", 0), "resid_mid", "resid_post", *names])
        self.logits = logits  # (B, T, V)
        self.cache = self.model.new_cache(*ids.shape)
        with study.running():
            self.model.trunk(ids, self.cache)
        self.running = study.running

    def stream(self, layer: int, half: str) -> Tensor:  # (B, T, C)
        """The stream of the base run at a layer, half "mid" or "post"."""
        return self.seen["resid_pre", 0] if layer < 0 else self.seen[f"resid_{half}", layer]

    def resume(self, changes: Sequence[Change], positions: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Compute the logits at some positions after each single change.

        Args:
            changes: changes, each applied alone. All changes with the same start must cover the same number of
                positions.
            positions: P positions, in any order.

        Yields:
            For each batch, the indices of its n changes and their logits (n, B, P, V).
        """
        positions = list(positions)
        begins: dict[int, list[int]] = {}
        for index in sorted(range(len(changes)), key=lambda index: changes[index].layer):
            begins.setdefault(changes[index].start, []).append(index)
        end = max(positions) + 1  # later positions do not affect the requested logits
        for start, indices in begins.items():
            count = max(1, TOKENS // (len(self.ids) * max(end - start, 1)))
            for first in range(0, len(indices), count):
                batch = indices[first : first + count]
                logits = self.logits[:, positions].expand(len(batch), -1, -1, -1)
                late = [place for place, position in enumerate(positions) if position >= start]
                if late:
                    logits = logits.clone()
                    with self.running():
                        wanted = [positions[place] - start for place in late]
                        logits[:, :, late] = self._after([changes[index] for index in batch], start, end, wanted)
                yield batch, logits

    def _after(self, changes: list[Change], start: int, end: int, wanted: list[int]) -> Tensor:
        """Logits (n, B, P, V) at the wanted positions, relative to `start`. The changes must be sorted by layer."""
        trunk, rows = self.model.trunk, len(self.ids)
        last = len(trunk.blocks) - 1
        joined = [sum(change.layer < layer for change in changes) for layer in range(last + 2)]
        cache = self._past(start, end, [count * rows for count in joined[:-1]])
        step = cache.begin(end - start)
        x: list[Tensor] = []  # (rows so far, T, C); empty before the first change
        for layer in range(changes[0].layer, last + 1):
            ends = min(wanted) if layer == last else 0  # after the last block only the wanted positions are needed
            if layer >= 0 and x:
                block = trunk.blocks[layer]
                assert isinstance(block, Block)
                x = [_ending(block, x[0], start, ends, cache) if layer == last else block(x[0], step, cache)]
            new = [change for change in changes if change.layer == layer]
            x += [self._joining(new, start, end)[:, ends:]] if new else []
            x = [torch.cat(x)] if x else []
        hidden = trunk.norm(x[0][:, [place - min(wanted) for place in wanted]])
        return self.model.unembed(hidden).unflatten(0, (len(changes), rows))

    def _joining(self, changes: list[Change], start: int, end: int) -> Tensor:
        """The stream after the changed block, (n B, end - start, C), for n changes of one layer."""
        layer = changes[0].layer
        changed = torch.stack([change.stream[:, : end - start] for change in changes])  # (n, B, changed positions, C)
        between = [index for index, change in enumerate(changes) if change.half == "mid"]
        if between:
            block = self.model.trunk.blocks[layer]
            assert isinstance(block, Block)
            changed[between] += block.mlp(block.norm2(changed[between]))
        rest = self.stream(layer, "post")[:, start + changed.shape[2] : end]
        return torch.cat([changed, rest.expand(len(changes), -1, -1, -1)], 2).flatten(0, 1)

    def _past(self, start: int, end: int, rows: list[int]) -> KVCache:
        """Create a cache with the base run's keys and values before `start`, repeated for the rows of each layer."""
        held = self.cache
        cache = KVCache(0, 1, 1, 1, 1, device=self.ids.device)
        for mine, theirs in ((cache.keys, held.keys), (cache.values, held.values)):
            for count, tensor in zip(rows, theirs, strict=True):
                room = tensor.new_empty(count, tensor.shape[1], end, tensor.shape[3])
                room.unflatten(0, (-1, len(tensor)))[:, :, :, :start] = tensor[:, :, :start]
                mine.append(room)
        cache.lengths.fill_(start)
        cache.longest = start
        return cache


def _ending(block: Block, x: Tensor, start: int, first: int, cache: KVCache) -> Tensor:
    """Output of the last block from position start + first on; earlier positions only provide keys and values."""
    if first:
        past = Step(torch.arange(start, start + first, device=x.device), None, False, start + first)
        _remember(block.attn, block.norm1(x[:, :first]), past, cache)
        cache.lengths.fill_(start + first)
        cache.longest = start + first
    return block(x[:, first:], cache.begin(x.shape[1] - first), cache)


def _remember(attn: Attention, x: Tensor, step: Step, cache: KVCache) -> None:
    """Append the keys and values of a normed stream (B, T, C) to the cache, without computing queries."""
    rows = slice(attn.n_head * attn.head_dim, None)
    bias = None if attn.qkv.bias is None else attn.qkv.bias[rows]
    heads = F.linear(x, attn.qkv.weight[rows], bias).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
    k, v = heads.chunk(2, 1)  # (B, G, T, D) each
    k = k if attn.k_norm is None else attn.k_norm(k)
    cache.append(attn.layer, attn.turned(k, step.positions), v, step)
