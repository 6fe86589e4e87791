"""The loop: token prompts in, an event for every token out, and the policies on where a sample ends.

Every sample of every prompt is a row of one batch. Each distinct prompt is read once, its cache row copied to its
samples; a row that ends leaves the batch. What a row gives does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minigpt.errors import ConfigError
from minigpt.sampling.batch import Batch, Choice, Row
from minigpt.sampling.config import check_field
from minigpt.sampling.decodable import Decodable
from minigpt.sampling.noise import fresh_seed
from minigpt.sampling.pipeline import Pipeline
from minigpt.sampling.stopping import Criterion, Reader


@dataclass(frozen=True)
class Event:
    """What happened to one sample in one step: a token, its end, or both."""

    prompt: int
    """The number of the prompt in the call."""
    sample: int
    """Which of the prompt's samples."""
    seed: int
    """The seed that the prompt's noise comes from."""
    token: int | None = None
    """The chosen token; None where a sample ends without one."""
    log_prob: float | None = None
    """The model's own log-probability of the token, before any processor (nats)."""
    text: str = ""
    """The text that has become certain: whole characters; what may begin a stop string is held back."""
    finish_reason: str | None = None
    """On the last event: end (end token), stop (stop string), length (max_new_tokens), context (the model's context is
    full), error, or a criterion's own reason."""
    error: str | None = None
    """Why, where the reason is error."""


def stream_rows(
    model: Decodable,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    processors: Sequence[Callable] = (),
    samples: int = 1,
    seeds: Sequence[int | None] | None = None,
    end_ids: Sequence[int] = (),
    overflow: str = "slide",
    reader: Callable[[Sequence[int]], Reader] | None = None,
    criteria: Sequence[Criterion] = (),
) -> Iterator[Event]:
    """Continue token prompts and yield an event for each row and step.

    The model is in evaluation mode from the first event on; its modules' modes are restored at the end, after an error,
    and when the iterator is closed early. No gradient is recorded, and the caller's gradient mode is left alone.

    Args:
        model: what predicts.
        prompts: token ids, at least one each.
        max_new_tokens: most tokens for each row.
        processors: applied in this order; see `minigpt.sampling.processors`.
        samples: rows for each prompt.
        seeds: one for each prompt; None draws a fresh one.
        end_ids: tokens that end a row; they count as written, but are not part of the text.
        overflow: "slide" moves the window on past the model's context, "stop" ends a row that has filled it.
        reader: makes, for a prompt's tokens, what turns the tokens after them into text; None for no text.
        criteria: further endings.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a prompt longer than the context with "stop",
            a seed out of range, something among the processors that is none.
    """
    check_prompts(prompts, model.vocab_size)
    longest = max(map(len, prompts), default=0)
    if overflow == "stop" and longest > model.max_context:
        raise ConfigError(
            f"a prompt has {longest} tokens, but the model's context is {model.max_context}; "
            "shorten the prompt, or sample with overflow 'slide'"
        )
    rows = []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds or [None] * len(prompts), strict=True)):
        check_field("seed", seed)
        seed = fresh_seed() if seed is None else int(seed)
        rows += [
            Row(number, sample, seed, list(prompt), max_new_tokens, reader(prompt) if reader else None)
            for sample in range(samples)
        ]
    most = model.max_context if overflow == "stop" else None
    return _stream(model, rows, Pipeline(processors), tuple(end_ids), most, criteria)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for a prompt without tokens, or with a token outside the vocabulary."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens; give at least one to start from")
        if min(prompt) >= 0 and max(prompt) < vocab_size:
            continue
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"prompt {number}: token id {token} at position {position} is outside the vocabulary of "
                    f"{vocab_size} tokens; expected an id from 0 to {vocab_size - 1}"
                )


def _stream(
    model: Decodable,
    rows: list[Row],
    pipeline: Pipeline,
    end_ids: tuple[int, ...],
    most: int | None,
    criteria: Sequence[Criterion],
) -> Iterator[Event]:
    yield from [_event(row, reason=_spent(row, most)) for row in rows if _spent(row, most)]
    rows = [row for row in rows if not _spent(row, most)]
    if not rows:
        return
    with _evaluating(model):
        batch = Batch(model, rows, pipeline, end_ids)
        while True:
            choices = batch.choose(batch.read())
            verdicts = [criterion(batch.context) for criterion in criteria]
            own_reasons = [next(filter(None, reasons), None) for reasons in zip(*verdicts, strict=True)]
            events = [
                _take(row, choice, end_ids, most, own)
                for row, choice, own in zip(batch.rows, choices, own_reasons or [None] * len(choices), strict=True)
            ]
            yield from events
            alive = [i for i, event in enumerate(events) if event.finish_reason is None]
            if not alive:
                return
            if len(alive) < len(events):
                batch.keep(alive)


def _take(row: Row, choice: Choice, end_ids: tuple[int, ...], most: int | None, own_reason: str | None) -> Event:
    """Give a row its chosen token. Of several reasons to end, the text's own go first."""
    if choice.error:
        return _event(row, reason="error", error=choice.error)
    row.tokens.append(choice.token)
    row.left -= 1
    if choice.token in end_ids:
        return _event(row, choice, reason="end")
    text, stopped = row.reader.push(choice.token) if row.reader else ("", False)
    return _event(row, choice, text, "stop" if stopped else own_reason or _spent(row, most))


def _spent(row: Row, most: int | None) -> str | None:
    """Why no further token may follow, if so."""
    if row.left <= 0:
        return "length"
    return "context" if most is not None and len(row.tokens) >= most else None


def _event(
    row: Row, choice: Choice | None = None, text: str = "", reason: str | None = None, error: str | None = None
) -> Event:
    """A row's event; the last one brings the rest of the text, in which a stop string may still be found."""
    if reason and row.reader:
        rest, stopped = row.reader.flush()
        text, reason = text + rest, "stop" if stopped else reason
    token, log_prob = (choice.token, choice.log_prob) if choice else (None, None)
    return Event(row.prompt, row.sample, row.seed, token, log_prob, text, reason, error)


@contextmanager
def _evaluating(model: Decodable) -> Iterator[None]:
    """Evaluation mode for every module of the model, each module's own mode restored at the end."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, torch.nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
