"""The generation loop: token prompts in, one event per token out; decides when a sample ends.

Every sample of every prompt is a row. Rows are written in batches: all at once, or sorted by length into as many as a
budget of rows and tokens asks for. Each distinct prompt is read once, its cache row copied to its samples; a row that
ends leaves its batch. What a row gives does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from minigpt.errors import ConfigError
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.draws.noise import fresh_seed
from minigpt.sampling.loop.batch import Batch, Row
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.loop.stopping import Criterion, Reader
from minigpt.sampling.loop.turn import Choice, Details, Stage, take_turn
from minigpt.sampling.settings.config import check_field


class Event(NamedTuple):
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
    """On the last event: end (end token), stop (stop string or sequence), length (max_new_tokens), context (the model's
    context is full), time (max_time), repetition, error, or a criterion's own reason."""
    error: str | None = None
    """Why, where the reason is error."""
    details: Details | None = None
    """How the token stood among the others, where asked for."""
    work: tuple[Stage, ...] = ()
    """What each processor did to the distribution, where asked for."""


def stream_rows(
    model: Decodable,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    processors: Sequence[Callable] = (),
    samples: int = 1,
    seeds: Sequence[int | None] | None = None,
    end_ids: Sequence[int] = (),
    overflow: str = "slide",
    readers: Callable[[int], Reader] | None = None,
    criteria: Sequence[Criterion] = (),
    forced: Sequence[Sequence[int]] | None = None,
    top: int | None = None,
    show: int = 0,
    max_rows: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Event]:
    """Continue token prompts and yield an event for each row and step.

    The model is in evaluation mode from the first event on; its modules' modes are restored at the end, after an error,
    and when the iterator is closed early. No gradient is recorded, and the caller's gradient mode is left alone.

    Args:
        model: what predicts.
        prompts: token ids, at least one each.
        max_new_tokens: most tokens for each row; one number, or one for each prompt.
        processors: applied in this order; see `minigpt.sampling.processors.processors`.
        samples: rows for each prompt.
        seeds: one for each prompt; None draws a fresh one.
        end_ids: tokens that end a row; they count as written, but are not part of the text.
        overflow: "slide" moves the window on past the model's context, "stop" ends a row that has filled it.
        readers: makes, for a prompt's number, what turns the tokens after it into text; None for no text.
        criteria: further endings.
        forced: for each prompt the tokens that it has to write and then ends, in place of max_new_tokens.
        top: how many of the likeliest tokens `Event.details` list; None for no details.
        show: how many of the likeliest tokens `Event.work` shows at every stage; 0 for no work.
        max_rows: most rows in a batch; None for all.
        max_tokens: most tokens that the cache of a batch has room for, but a row is always written; None for no limit.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a prompt longer than the context with "stop",
            a seed out of range, something among the processors that is none.
    """
    check_prompts(prompts, model.vocab_size, model.max_context if overflow == "stop" else None)
    if forced is not None:
        check_forced(forced, model.vocab_size)
        room = [len(tokens) for tokens in forced]
    else:
        room = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    rows = []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds or [None] * len(prompts), strict=True)):
        check_field("seed", seed)
        seed = fresh_seed() if seed is None else int(seed)
        rows += [
            Row(
                prompt=number,
                sample=sample,
                seed=seed,
                tokens=list(prompt),
                left=int(room[number]),
                reader=readers(number) if readers else None,
                forced=tuple(forced[number]) if forced is not None else (),
            )
            for sample in range(samples)
        ]
    most = model.max_context if overflow == "stop" else None
    pipeline = Pipeline(processors)

    def write(batch_rows: list[Row]) -> Iterator[Event]:
        batch = Batch(model, batch_rows, pipeline, tuple(end_ids))
        return _write(batch, most, criteria, top, show)

    return _stream(model, rows, most, write, lambda open_rows: divide(open_rows, model, max_rows, max_tokens))


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, most: int | None = None) -> None:
    """Raise ConfigError for a prompt without tokens, with more than `most`, or with one outside the vocabulary."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens; give at least one to start from")
        if most is not None and len(prompt) > most:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens, but the model's context is {most}; "
                "shorten the prompt, or sample with overflow 'slide'"
            )
        _check_ids(f"prompt {number}", prompt, vocab_size)


def check_forced(forced: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for a token to be written that is outside the vocabulary."""
    for number, tokens in enumerate(forced):
        if tokens:
            _check_ids(f"continuation {number}", tokens, vocab_size)


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    if min(ids) >= 0 and max(ids) < vocab_size:
        return
    position, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size)
    raise ConfigError(
        f"{what}: token id {token} at position {position} is outside the vocabulary of {vocab_size} tokens; "
        f"expected an id from 0 to {vocab_size - 1}"
    )


def divide(rows: list[Row], model: Decodable, max_rows: int | None, max_tokens: int | None) -> Iterator[list[Row]]:
    """Rows in batches within the budget: those of like length together, the longest last; without one all at once."""
    if max_rows is None and max_tokens is None:
        yield rows
        return
    batch: list[Row] = []
    longest = 0
    for row in sorted(rows, key=lambda row: len(row.tokens) + row.left):
        longest = max(longest, min(model.max_context, len(row.tokens) + row.left))
        full = max_rows is not None and len(batch) >= max_rows
        if batch and (full or (max_tokens is not None and longest * (len(batch) + 1) > max_tokens)):
            yield batch
            batch, longest = [], min(model.max_context, len(row.tokens) + row.left)
        batch.append(row)
    yield batch


def _stream(
    model: Decodable,
    rows: list[Row],
    most: int | None,
    write: Callable[[list[Row]], Iterator[Event]],
    batches: Callable[[list[Row]], Iterable[list[Row]]],
) -> Iterator[Event]:
    yield from [_event(row, reason=_spent(row, most)) for row in rows if _spent(row, most)]
    rows = [row for row in rows if not _spent(row, most)]
    if rows:
        with evaluating(model):
            for batch_rows in batches(rows):
                yield from write(batch_rows)


def _write(
    batch: Batch, most: int | None, criteria: Sequence[Criterion], top: int | None, show: int
) -> Iterator[Event]:
    """Write the rows of a batch to their ends."""
    while True:
        choices = take_turn(batch, top, show)
        verdicts = [_verdict(criterion, batch) for criterion in criteria]
        own_reasons = [next(filter(None, reasons), None) for reasons in zip(*verdicts, strict=True)]
        events = [
            _take(row, choice, batch.context.end_ids, most, own)
            for row, choice, own in zip(batch.rows, choices, own_reasons or [None] * len(choices), strict=True)
        ]
        yield from events
        alive = [i for i, event in enumerate(events) if event.finish_reason is None]
        if not alive:
            return
        if len(alive) < len(events):
            batch.gather(closed_up(alive))


def _verdict(criterion: Criterion, batch: Batch) -> list[str | None]:
    """A criterion's reason for each row."""
    reasons = criterion(batch.context)
    if not isinstance(reasons, (list, tuple)) or len(reasons) != len(batch.rows):
        raise ConfigError(
            f"sampling: criterion {criterion!r} returned {reasons!r}; expected a list with a reason or None for each "
            f"of {len(batch.rows)} rows"
        )
    return list(reasons)


def closed_up(alive: Sequence[int]) -> list[int]:
    """These rows in an order that leaves most of them where they are: the last ones fill the gaps."""
    stay = {row for row in alive if row < len(alive)}
    movers = (row for row in alive if row >= len(alive))
    return [row if row in stay else next(movers) for row in range(len(alive))]


def _take(row: Row, choice: Choice, end_ids: tuple[int, ...], most: int | None, own_reason: str | None) -> Event:
    """What a row's choice means for it. Of several reasons to end, the text's own go first."""
    if choice.error:
        return _event(row, reason="error", error=choice.error)
    if choice.token in end_ids and not (row.forced and row.left):  # what has to be written goes on past an end
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
    if choice is None:
        return Event(row.prompt, row.sample, row.seed, None, None, text, reason, error)
    return Event(
        row.prompt,
        row.sample,
        row.seed,
        choice.token,
        choice.log_prob,
        text,
        reason,
        error,
        choice.details,
        choice.work,
    )


_evaluated: WeakKeyDictionary[torch.nn.Module, tuple[int, list[tuple[torch.nn.Module, bool]]]] = WeakKeyDictionary()
"""Models in use: by how many, and each module's own mode."""


@contextmanager
def evaluating(model: Decodable) -> Iterator[None]:
    """Evaluation mode for every module of the model; each module's own mode comes back when the last use ends."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    uses, modes = _evaluated.get(model) or (0, [(module, module.training) for module in model.modules()])
    _evaluated[model] = uses + 1, modes
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        uses, modes = _evaluated.pop(model)
        if uses > 1:
            _evaluated[model] = uses - 1, modes
        else:
            for module, training in modes:
                module.training = training
