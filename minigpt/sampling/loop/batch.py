"""The rows being generated: read tokens, choose the next ones, move and drop rows.

All that has a row axis is here, so that whatever moves rows moves every part of them: the model's cache, the
processors' states, the context that they look at, the noise.

A model sees at most T = max_context tokens. With n tokens so far it is shown those from `window_start(n, T)` on. Since
this is a function of n alone, a text continued from where another call stopped goes on as that call would have, and a
long prompt is treated as if it had been generated. The window moves by half a context at a time, and then the batch is
read anew into a fresh cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt.sampling.draws.decodable import Decodable, device_of
from minigpt.sampling.draws.noise import Noise
from minigpt.sampling.loop.pipeline import Pipeline, gather_state
from minigpt.sampling.loop.stopping import Reader
from minigpt.sampling.processors.processors import Context


@dataclass
class Row:
    """One sample on its way."""

    prompt: int
    """The number of its prompt in the call."""
    sample: int
    """Which of the prompt's samples it is."""
    seed: int
    tokens: list[int]
    """Prompt and written ones."""
    left: int
    """How many may still be written."""
    reader: Reader | None = None
    forced: tuple[int, ...] = ()
    """What it has to write, whatever the logits say."""


def window_start(n: int, context: int) -> int:
    """The first of n tokens that a model of `context` tokens is shown: 0, or else a multiple of half the context."""
    if n <= context:
        return 0
    step = max(1, context // 2)
    return -(-(n - context) // step) * step


class Batch:
    """Rows whose next tokens are chosen together. A turn is

        raw = batch.read()                      what the model says
        processed = batch.process(raw)          what the processors make of it
        batch.take(tokens, raw, processed)      what was chosen

    and between turns `gather` moves, copies and drops rows. The caller has switched gradients off.

    Args:
        model: what predicts.
        rows: at least one; `Row.tokens` grow as tokens are taken.
        pipeline: what the logits go through before a choice.
        end_ids: told to the processors.
    """

    @torch.no_grad()
    def __init__(self, model: Decodable, rows: list[Row], pipeline: Pipeline, end_ids: tuple[int, ...] = ()) -> None:
        self.model, self.rows, self.pipeline = model, rows, pipeline
        self.model_device = device_of(model)
        # mps has no float64, in which tokens are drawn: there all that follows the model happens on the CPU.
        self.device = torch.device("cpu") if self.model_device.type == "mps" else self.model_device
        self.ids = _padded([row.tokens for row in rows], self.device)  # (B, L and room to write)
        positions = np.array([len(row.tokens) for row in rows])
        self.longest = int(positions.max())  # tokens of the longest row
        lengths = torch.tensor(positions, device=self.device)
        self.context = Context(
            ids=self.ids,
            prompt_lengths=lengths,
            lengths=lengths,
            positions=positions,
            rows=tuple(row.prompt for row in rows),
            end_ids=end_ids,
            noise=Noise([row.seed for row in rows], [row.sample for row in rows]),
        )
        self.cache: Any = None
        self.states: Any = pipeline.start(self.context)
        # The last choice: tokens (B,) that the model has yet to read; for the states also raw and processed logits.
        self.latest: Any = None

    def read(self) -> Tensor:
        """Have the model read what it has not seen: (B, V) logits for every row's next token, at least float32."""
        if self.latest is not None:
            self.states = self.pipeline.accept(self.states, *self.latest)
        if self.cache is not None and not self._window_moves():
            logits = self.model.next_logits(self.latest[0].unsqueeze(1).to(self.model_device), self.cache, None)
        else:
            context = self.model.max_context
            logits = self._read_anew([tuple(row.tokens[window_start(len(row.tokens), context) :]) for row in self.rows])
        return logits.to(self.device, torch.promote_types(logits.dtype, torch.float32))

    def _window_moves(self) -> bool:
        """Whether the latest token of some row made its window begin elsewhere."""
        context = self.model.max_context
        lengths = [len(row.tokens) for row in self.rows] if self.longest > context else []
        return any(window_start(length, context) != window_start(length - 1, context) for length in lengths)

    def _read_anew(self, windows: list[tuple[int, ...]]) -> Tensor:
        """Read the rows' windows into a fresh cache, equal ones once: (B, V) logits."""
        places = {window: place for place, window in enumerate(dict.fromkeys(windows))}
        room = max(len(window) + row.left for window, row in zip(windows, self.rows, strict=True))
        self.cache = None  # the old one goes before the new one comes
        self.cache = self.model.new_cache(len(places), min(self.model.max_context, room))
        counts = torch.tensor([len(window) for window in places], device=self.model_device)
        logits = self.model.next_logits(_padded(list(places), self.model_device), self.cache, counts)
        if len(places) < len(windows):
            source = torch.tensor([places[window] for window in windows], device=self.model_device)
            self.cache.gather(source)
            logits = logits[source]
        return logits

    def process(self, raw: Tensor, greedy: list[bool] | None = None) -> Tensor:
        """The model's logits after every processor: (B, V) in and out; greedy: as for `Pipeline.stages`."""
        return self.pipeline(self.context, raw, self.states, greedy)

    def take(self, tokens: Tensor, raw: Tensor, processed: Tensor, on_host: Sequence[int] | None = None) -> None:
        """Append a token to every row.

        Args:
            tokens: (B,) int64.
            raw: (B, V) the model's logits, from which processors with memory learn.
            processed: (B, V) those that the tokens were chosen from.
            on_host: the tokens as plain numbers, if they are known.
        """
        for row, token in zip(self.rows, tokens.tolist() if on_host is None else on_host, strict=True):
            row.tokens.append(token)
            row.left -= 1
        self.latest = (tokens, raw, processed) if self.pipeline.remembers else (tokens, None, None)
        context = self.context
        self.longest += 1  # every row grows by one
        if self.longest > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, self.ids.shape[1] + 64))
        self.ids.scatter_(1, context.lengths.unsqueeze(1), tokens.unsqueeze(1))
        self.context = Context(  # written out: a turn is short, and `replace` is slow
            ids=self.ids[:, : self.longest],
            prompt_lengths=context.prompt_lengths,
            lengths=context.lengths + 1,
            positions=context.positions + 1,
            rows=context.rows,
            end_ids=context.end_ids,
            noise=context.noise,
        )

    @torch.no_grad()
    def gather(self, rows: Sequence[int], start: int = 0) -> None:
        """Make row i a copy of the former row rows[i]: select, repeat or reorder.

        Args:
            rows: row numbers, at least one.
            start: places before it are known to agree between row i and row rows[i]; not 0 only for as many rows.
        """
        rows = list(rows)
        index = torch.tensor(rows, device=self.device)
        if self.cache is not None:
            self.cache.gather(index.to(self.model_device), start)
        # A row that goes on several times needs a list of tokens for each.
        self.rows = [replace(self.rows[i], tokens=list(self.rows[i].tokens)) for i in rows]
        self.states, self.latest = gather_state((self.states, self.latest), rows)
        self.ids = self.ids[index]
        positions = self.context.positions[rows]
        self.longest = int(positions.max())
        self.context = replace(
            self.context,
            ids=self.ids[:, : self.longest],
            prompt_lengths=self.context.prompt_lengths[index],
            lengths=self.context.lengths[index],
            positions=positions,
            rows=tuple(row.prompt for row in self.rows),
            noise=self.context.noise.gather(rows),
        )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of unequal length as one (B, T) int64 tensor, zeros at the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
