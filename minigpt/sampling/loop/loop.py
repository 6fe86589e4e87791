"""The generation loop: token prompts in, one event per token out; decides when a sample ends.

Every sample of every prompt is a row. Rows are generated in batches: all in one batch, or sorted by length and split to
stay within a limit of rows and tokens. Each distinct prompt is read once, and its cache row is copied to all of its
samples. A row that ends leaves its batch. The result of a row does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from minigpt.errors import ConfigError, MemoryExceeded
from minigpt.model.device import memory_errors, release_memory
from minigpt.model.modes import evaluating
from minigpt.sampling.draws.decodable import Decodable
from minigpt.sampling.draws.noise import fresh_seed
from minigpt.sampling.loop.batch import Batch, Row
from minigpt.sampling.loop.pipeline import Pipeline
from minigpt.sampling.loop.room import Room
from minigpt.sampling.loop.stopping import Criterion, Reader
from minigpt.sampling.loop.turn import Choice, Details, Stage, take_turn
from minigpt.sampling.settings.config import check_field

MEMORY_ADVICE = "set a smaller max_rows, max_new_tokens or num_beams, or free some memory"


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
    numbers: Sequence[int] | None = None,
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
        max_rows: maximum number of rows per batch; None for as many as fit in memory (see room.py).
        max_tokens: maximum number of tokens in the cache of a batch, None for no limit; a batch has at least one row.
        numbers: the prompts' numbers for events and processors; None for 0, 1, 2, ...

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, a prompt longer than the context with "stop",
            a seed out of range, or an invalid processor.
        MemoryExceeded: while iterating, if memory runs out.
    """
    check_prompts(prompts, model.vocab_size, model.max_context if overflow == "stop" else None, numbers)
    if forced is not None:
        check_forced(forced, model.vocab_size)
        room = [len(tokens) for tokens in forced]
    else:
        room = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    called = list(range(len(prompts)) if numbers is None else numbers)
    own_seeds: list[int] = []
    for seed in seeds or [None] * len(prompts):
        check_field("seed", seed)
        own_seeds.append(fresh_seed() if seed is None else int(seed))
    places = {number: place for place, number in enumerate(called)}

    def row(number: int, sample: int) -> Row:
        """A row at its beginning."""
        place = places[number]
        return Row(
            prompt=number,
            sample=sample,
            seed=own_seeds[place],
            tokens=list(prompts[place]),
            left=int(room[place]),
            reader=readers(number) if readers else None,
            forced=tuple(forced[place]) if forced is not None else (),
        )

    most = model.max_context if overflow == "stop" else None
    pipeline = Pipeline(processors)

    def write(batch_rows: list[Row]) -> Iterator[Event]:
        batch = Batch(model, batch_rows, pipeline, tuple(end_ids))
        return _write(batch, most, criteria, top, show)

    rows = [row(number, sample) for number in called for sample in range(samples)]
    return _stream(rows, most, write, row, lambda open_rows: divide(open_rows, model, max_rows, max_tokens))


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, most: int | None = None, numbers: Sequence[int] | None = None
) -> None:
    """Raise ConfigError for a prompt that is empty, longer than `most` tokens, or has an id outside the vocabulary.

    `numbers` are those of the prompts in the message; None for 0, 1, 2, ...
    """
    for number, prompt in zip(numbers or range(len(prompts)), prompts, strict=True):
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


def divide(
    rows: list[Row], model: Decodable, max_rows: int | None, max_tokens: int | None, beams: int = 1
) -> list[list[Row]]:
    """Split rows into batches of similar length, within the limits and the memory that is free.

    The batch that has the first prompt comes first. `beams` is the number of rows that each row stands for.
    """
    room = Room(model)
    batches: list[list[Row]] = [[]]
    shortest = 0
    for row in sorted(rows, key=lambda row: len(row.tokens) + row.left):
        total, count = len(row.tokens) + row.left, (len(batches[-1]) + 1) * beams
        slots = min(model.max_context, total)
        full = max_rows is not None and count > max_rows
        full = full or (max_tokens is not None and slots * count > max_tokens)
        # Tokens beyond the context cost the model nothing, but processors look at all of a row.
        full = full or len(row.tokens) > 4 * max(shortest, model.max_context)
        if batches[-1] and (full or not room.fits(count, total)):
            batches.append([])
        if not batches[-1]:
            shortest = len(row.tokens)
        batches[-1].append(row)
    return sorted(batches, key=lambda batch: min(row.prompt for row in batch))


def _stream(
    rows: list[Row],
    most: int | None,
    write: Callable[[list[Row]], Iterator[Event]],
    anew: Callable[[int, int], Row],
    batches: Callable[[list[Row]], list[list[Row]]],
) -> Iterator[Event]:
    """Events of all rows. A batch for which memory runs out is cut in two, and its open rows begin anew: a row's tokens
    do not depend on its batch, so they are the same, and are not reported twice.
    """
    yield from [_event(row, reason=_spent(row, most)) for row in rows if _spent(row, most)]
    rows = [row for row in rows if not _spent(row, most)]
    waiting = batches(rows)[::-1] if rows else []
    reported: dict[tuple[int, int], int] = {}  # events of rows that begin anew
    while waiting:
        batch = waiting.pop()
        count, longest = len(batch), max(len(row.tokens) + row.left for row in batch)
        told = {(row.prompt, row.sample): 0 for row in batch}  # events of the rows that have not ended
        try:
            with memory_errors(f"with {count} rows of up to {longest} tokens; {MEMORY_ADVICE}"):
                for event in write(batch):
                    place = event.prompt, event.sample
                    told[place] += 1
                    if told[place] > reported.get(place, 0):
                        yield event
                    if event.finish_reason is not None:
                        del told[place]
        except MemoryExceeded:
            if len(told) < 2:
                raise
        rows = [anew(*place) for place in told]
        if rows:
            reported.update({place: max(number, reported.get(place, 0)) for place, number in told.items()})
            half = len(rows) // 2
            waiting += [rows[half:], rows[:half]]
        if waiting:
            release_memory()


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
