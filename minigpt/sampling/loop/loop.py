"""The generation loop: token prompts in, one event per token out; decides when a sample ends.

Every sample of every prompt is a row. Rows are generated in batches: all in one batch, or sorted by length and split to
stay within a limit of rows and tokens. Each distinct prompt is read once, and its cache row is copied to all of its
samples. A row that ends leaves its batch. The result of a row does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from minigpt.errors import ConfigError
from minigpt.model.modes import evaluating
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.draws.noise import fresh_seed
from minigpt.sampling.loop.batch import Batch, Row
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.loop.stopping import Criterion, Reader
from minigpt.sampling.loop.turn import Choice, Details, Stage, take_turn
from minigpt.sampling.settings.config import check_field


class Event(NamedTuple):
    """One step of one sample: a new token, the end of the sample, or both."""

    prompt: int
    """Index of the prompt in the call."""
    sample: int
    """Index of the sample among those of its prompt."""
    seed: int
    """Random seed of the prompt."""
    token: int | None = None
    """The chosen token; None if a sample ends without one."""
    log_prob: float | None = None
    """The model's log-probability of the token, before any processor (nats)."""
    text: str = ""
    """New text that is final: whole characters only, without text that may be the start of a stop string."""
    finish_reason: str | None = None
    """On the last event: end (end token), stop (stop string or sequence), length (max_new_tokens), context (the model's
    context is full), time (max_time), repetition, error, or a criterion's own reason."""
    error: str | None = None
    """The error message if finish_reason is error."""
    details: Details | None = None
    """Rank and log-probabilities of the token and of the most likely tokens, if requested."""
    work: tuple[Stage, ...] = ()
    """The distribution after each processor, if requested."""


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

    The model is in evaluation mode while it computes, and its modules have their own modes again at every event. No
    gradients are recorded; the caller's gradient mode does not change.

    Args:
        model: the model that predicts the next token.
        prompts: token ids, at least one per prompt.
        max_new_tokens: maximum number of tokens per row; one number, or one per prompt.
        processors: applied in this order; see `minigpt.sampling.processors.processors`.
        samples: rows per prompt.
        seeds: one per prompt; None draws a random seed.
        end_ids: tokens that end a row; they are among the generated ids, but not part of the text.
        overflow: "slide" moves the window past the model's context, "stop" ends a row that has filled the context.
        readers: takes a prompt's index and returns a reader that turns its new tokens into text; None for no text.
        criteria: additional stopping criteria.
        forced: per prompt, the exact tokens to generate; used instead of max_new_tokens.
        top: number of most likely tokens in `Event.details`; None for no details.
        show: number of most likely tokens that `Event.work` shows at every stage; 0 for none.
        max_rows: maximum number of rows per batch; None for no limit.
        max_tokens: maximum number of tokens in the cache of a batch, None for no limit; a batch has at least one row.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a prompt longer than the context with "stop",
            a seed out of range, or an invalid processor.
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
    """Raise ConfigError for a prompt that is empty, longer than `most` tokens, or has an id outside the vocabulary."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens; give at least one token")
        if most is not None and len(prompt) > most:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens, but the model's context is {most}; "
                "shorten the prompt, or sample with overflow 'slide'"
            )
        _check_ids(f"prompt {number}", prompt, vocab_size)


def check_forced(forced: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for a forced token outside the vocabulary."""
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
    """Split rows into batches within the limits, sorted by length, longest last; without limits, one batch."""
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
        for batch_rows in batches(rows):
            yield from write(batch_rows)


def _write(
    batch: Batch, most: int | None, criteria: Sequence[Criterion], top: int | None, show: int
) -> Iterator[Event]:
    """Generate until every row of a batch has ended."""
    modules = list(batch.model.modules()) if isinstance(batch.model, nn.Module) else None
    while True:
        with evaluating(batch.model, modules):
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
    """The finish reason, or None, that a criterion returns for each row."""
    reasons = criterion(batch.context)
    if not isinstance(reasons, (list, tuple)) or len(reasons) != len(batch.rows):
        raise ConfigError(
            f"sampling: criterion {criterion!r} returned {reasons!r}; expected a list with a reason or None for each "
            f"of {len(batch.rows)} rows"
        )
    return list(reasons)


def closed_up(alive: Sequence[int]) -> list[int]:
    """Order the remaining rows so that most keep their index: the last rows fill the gaps."""
    stay = {row for row in alive if row < len(alive)}
    movers = (row for row in alive if row >= len(alive))
    return [row if row in stay else next(movers) for row in range(len(alive))]


def _take(row: Row, choice: Choice, end_ids: tuple[int, ...], most: int | None, own_reason: str | None) -> Event:
    """The event for a row's choice. Of several finish reasons, end tokens and stop strings take precedence."""
    if choice.error:
        return _event(row, reason="error", error=choice.error)
    if choice.token in end_ids and not (row.forced and row.left):  # forced tokens continue after an end token
        return _event(row, choice, reason="end")
    text, stopped = row.reader.push(choice.token) if row.reader else ("", False)
    return _event(row, choice, text, "stop" if stopped else own_reason or _spent(row, most))


def _spent(row: Row, most: int | None) -> str | None:
    """The finish reason if the row has reached its token limit or the context length, else None."""
    if row.left <= 0:
        return "length"
    return "context" if most is not None and len(row.tokens) >= most else None


def _event(
    row: Row, choice: Choice | None = None, text: str = "", reason: str | None = None, error: str | None = None
) -> Event:
    """The event of a row. The last one includes the rest of the text, which may still complete a stop string."""
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
