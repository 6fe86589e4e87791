"""The rows being generated: read tokens, choose the next ones, move and drop rows.

Everything with a row axis is kept here, so that moving a row moves all of its parts: the model's cache, the processors'
states, the context that processors see, and the noise.

A model sees at most T = max_context tokens. Of a sequence of n tokens it sees those from `window_start(n, T)` on. This
depends on n alone. So a call that continues another call's output gives the same tokens as one longer call, and a long
prompt is treated like generated tokens. The window moves by half a context at a time; the batch is then read again into
a new cache.
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
    """One sample during generation."""

    prompt: int
    """Index of its prompt in the call."""
    sample: int
    """Index of the sample among those of its prompt."""
    seed: int
    tokens: list[int]
    """Prompt and generated tokens."""
    left: int
    """Maximum number of tokens still to generate."""
    reader: Reader | None = None
    forced: tuple[int, ...] = ()
    """Tokens to generate regardless of the logits."""


def window_start(n: int, context: int) -> int:
    """Index of the first of n tokens that a model with a context of `context` tokens sees.

    It is 0 or a multiple of half the context.
    """
    if n <= context:
        return 0
    step = max(1, context // 2)
    return -(-(n - context) // step) * step


class Batch:
    """Rows that generate their next tokens together. One step is

        raw = batch.read()                      the model's logits
        processed = batch.process(raw)          the logits after all processors
        batch.take(tokens, raw, processed)      append the chosen tokens

    Between steps `gather` reorders, copies and drops rows. The caller disables gradients.

    Args:
        model: the model that predicts the next token.
        rows: at least one; `take` appends to `Row.tokens`.
        pipeline: the processors to apply to the logits.
        end_ids: end tokens, passed to the processors.
    """

    @torch.no_grad()
    def __init__(self, model: Decodable, rows: list[Row], pipeline: Pipeline, end_ids: tuple[int, ...] = ()) -> None:
        self.model, self.rows, self.pipeline = model, rows, pipeline
        self.model_device = device_of(model)
        # mps has no float64, which sampling a token needs: with mps, everything after the model runs on the CPU.
        self.device = torch.device("cpu") if self.model_device.type == "mps" else self.model_device
        self.ids = _padded([row.tokens for row in rows], self.device)  # (B, L plus room for new tokens)
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
        # The latest choice: tokens (B,) that the model has not read yet, and the logits for updating the states.
        self.latest: Any = None

    def read(self) -> Tensor:
        """Run the model on the tokens it has not read yet: (B, V) logits of each row's next token, at least float32."""
        if self.latest is not None:
            self.states = self.pipeline.accept(self.states, *self.latest)
        if self.cache is not None and not self._window_moves():
            logits = self.model.next_logits(self.latest[0].unsqueeze(1).to(self.model_device), self.cache, None)
        else:
            context = self.model.max_context
            logits = self._read_anew([tuple(row.tokens[window_start(len(row.tokens), context) :]) for row in self.rows])
        return logits.to(self.device, torch.promote_types(logits.dtype, torch.float32))

    def _window_moves(self) -> bool:
        """Whether the latest token moved the start of any row's window."""
        context = self.model.max_context
        lengths = [len(row.tokens) for row in self.rows] if self.longest > context else []
        return any(window_start(length, context) != window_start(length - 1, context) for length in lengths)

    def _read_anew(self, windows: list[tuple[int, ...]]) -> Tensor:
        """Read the rows' windows into a new cache, identical windows only once: (B, V) logits."""
        places = {window: place for place, window in enumerate(dict.fromkeys(windows))}
        room = max(len(window) + row.left for window, row in zip(windows, self.rows, strict=True))
        self.cache = None  # free the old cache before allocating the new one
        self.cache = self.model.new_cache(len(places), min(self.model.max_context, room))
        counts = torch.tensor([len(window) for window in places], device=self.model_device)
        logits = self.model.next_logits(_padded(list(places), self.model_device), self.cache, counts)
        if len(places) < len(windows):
            source = torch.tensor([places[window] for window in windows], device=self.model_device)
            self.cache.gather(source)
            logits = logits[source]
        return logits

    def process(self, raw: Tensor, greedy: list[bool] | None = None) -> Tensor:
        """Apply every processor to the model's logits, (B, V) -> (B, V); `greedy` is as in `Pipeline.stages`."""
        return self.pipeline(self.context, raw, self.states, greedy)

    def take(self, tokens: Tensor, raw: Tensor, processed: Tensor, on_host: Sequence[int] | None = None) -> None:
        """Append a token to every row.

        Args:
            tokens: (B,) int64.
            raw: (B, V) the model's logits, which update processors with a state.
            processed: (B, V) the logits that the tokens were chosen from.
            on_host: the tokens as Python ints, if available.
        """
        for row, token in zip(self.rows, tokens.tolist() if on_host is None else on_host, strict=True):
            row.tokens.append(token)
            row.left -= 1
        self.latest = (tokens, raw, processed) if self.pipeline.remembers else (tokens, None, None)
        context = self.context
        self.longest += 1  # every row grows by one token
        if self.longest > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, self.ids.shape[1] + 64))
        self.ids.scatter_(1, context.lengths.unsqueeze(1), tokens.unsqueeze(1))
        self.context = Context(  # not `replace`, which is slow compared with a step
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
        """Make row i a copy of the previous row rows[i]: select, repeat or reorder rows.

        Args:
            rows: row indices, at least one.
            start: positions before it are identical in row i and row rows[i] and need no copying; must be 0 if the
                number of rows changes.
        """
        rows = list(rows)
        index = torch.tensor(rows, device=self.device)
        if self.cache is not None:
            self.cache.gather(index.to(self.model_device), start)
        # A row that is repeated needs a separate list of tokens for each copy.
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
    """Pad rows of different length with zeros on the right: one (B, T) int64 tensor."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
