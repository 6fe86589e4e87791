"""The rows being written, in step with the model: reading tokens, choosing the next, letting go of rows that ended.

All that has a row axis is here, so that whatever moves rows moves every part of them: the model's cache, the
processors' states, the context that they look at, the noise.

A model sees at most T = max_context tokens. With n tokens so far it is shown those from `window_start(n, T)` on. Since
this is a function of n alone, a text continued from where another call stopped goes on as that call would have, and a
long prompt is treated as if it had been generated. The window moves by half a context at a time, and then the batch is
read anew into a fresh cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt.sampling.choice import choose
from minigpt.sampling.decodable import Decodable, device_of
from minigpt.sampling.noise import Noise, Purpose
from minigpt.sampling.pipeline import Pipeline, gather_state
from minigpt.sampling.processors import Context
from minigpt.sampling.stopping import Reader


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


@dataclass(frozen=True)
class Choice:
    """What a row goes on with, or why it cannot."""

    token: int
    log_prob: float
    """The model's own log-probability of the token, before any processor."""
    error: str | None = None


def window_start(n: int, context: int) -> int:
    """The first of n tokens that a model of `context` tokens is shown: 0, or else a multiple of half the context."""
    if n <= context:
        return 0
    step = max(1, context // 2)
    return -(-(n - context) // step) * step


class Batch:
    """Rows whose next tokens are chosen together. A turn is read, choose, keep.

    Args:
        model: what predicts.
        rows: at least one; `Row.tokens` is theirs to extend between `choose` and `read`.
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
        # The last choice, which the states have yet to accept: tokens (B,), raw and processed logits (B, V).
        self.latest: Any = None

    @torch.no_grad()
    def read(self) -> Tensor:
        """Have the model read what it has not seen: (B, V) logits for every row's next token."""
        if self.latest is not None:
            self.states = self.pipeline.accept(self.states, *self.latest)
        context = self.model.max_context
        starts = [window_start(len(row.tokens), context) for row in self.rows]
        if self.cache is not None and all(
            start == window_start(len(row.tokens) - 1, context) for start, row in zip(starts, self.rows, strict=True)
        ):
            return self.model.next_logits(self.latest[0].unsqueeze(1).to(self.model_device), self.cache, None)
        return self._read_anew([tuple(row.tokens[start:]) for start, row in zip(starts, self.rows, strict=True)])

    def _read_anew(self, windows: list[tuple[int, ...]]) -> Tensor:
        """Read the rows' windows into a fresh cache, equal ones once: (B, V) logits."""
        places = {window: place for place, window in enumerate(dict.fromkeys(windows))}
        longest, left = max(map(len, places)), max(row.left for row in self.rows)
        self.cache = None  # the old one goes before the new one comes
        self.cache = self.model.new_cache(len(places), min(self.model.max_context, longest + left))
        counts = torch.tensor([len(window) for window in places], device=self.model_device)
        logits = self.model.next_logits(_padded(list(places), self.model_device), self.cache, counts)
        if len(places) < len(windows):
            source = torch.tensor([places[window] for window in windows], device=self.model_device)
            self.cache.gather(source)
            logits = logits[source]
        return logits

    @torch.no_grad()
    def choose(self, logits: Tensor) -> list[Choice]:
        """Choose each row's next token from the model's (B, V) logits and append it to the context."""
        raw = logits.to(self.device, torch.promote_types(logits.dtype, torch.float32))
        processed = self.pipeline(self.context, raw, self.states)
        greedy = self.pipeline.greedy(self.context)
        uniforms = None if all(greedy) else self.context.uniform(Purpose.CHOICE)
        tokens = choose(processed, uniforms, greedy)
        log_probs = raw.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        # One transfer to the host for all three: float64 holds every token id exactly.
        on_host = torch.stack((tokens.double(), log_probs.double(), processed.amax(-1).double()), dim=1).tolist()
        choices = []
        for row, (token, log_prob, peak) in enumerate(on_host):
            sound = math.isfinite(peak) and not math.isnan(log_prob)
            choices.append(Choice(int(token), log_prob, None if sound else self._error(raw, row)))
        self.latest = (tokens, raw, processed) if self.pipeline.remembers else (tokens, None, None)
        self._append(tokens)
        return choices

    def _error(self, raw: Tensor, row: int) -> str:
        reason = self.pipeline.blame(self.context, raw, self.states, row)
        return f"no token for position {self.context.positions[row]}: {reason}"

    def _append(self, tokens: Tensor) -> None:
        lengths, positions = self.context.lengths, self.context.positions + 1
        longest = int(positions.max())
        if longest > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, self.ids.shape[1] + 64))
        self.ids.scatter_(1, lengths.unsqueeze(1), tokens.unsqueeze(1))
        self.context = replace(self.context, ids=self.ids[:, :longest], lengths=lengths + 1, positions=positions)

    @torch.no_grad()
    def keep(self, alive: list[int]) -> None:
        """Let go of all rows but these."""
        index = torch.tensor(alive, device=self.device)
        self.cache.gather(index.to(self.model_device))
        self.rows = [self.rows[i] for i in alive]
        self.states, self.latest = gather_state((self.states, self.latest), alive)
        self.ids = self.ids[index]
        positions = self.context.positions[alive]
        self.context = replace(
            self.context,
            ids=self.ids[:, : positions.max()],
            prompt_lengths=self.context.prompt_lengths[index],
            lengths=self.context.lengths[index],
            positions=positions,
            rows=tuple(row.prompt for row in self.rows),
            noise=self.context.noise.gather(alive),
        )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of unequal length as one (B, T) int64 tensor, zeros at the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
