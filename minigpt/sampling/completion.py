"""`Completion`: the result of one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minigpt.sampling.loop.loop import Event
from minigpt.sampling.loop.turn import Details, Stage
from minigpt.sampling.settings.calls import Call


class Usage(NamedTuple):
    """Token counts of a sample."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """One sample: the continuation of a prompt."""

    prompt_ids: list[int]
    """Token ids of the prompt; for an empty prompt, the token it starts from."""
    ids: list[int]
    """Generated token ids, including the end token or stop string."""
    text: str
    """The generated text, without the end token and (unless include_stop) without the stop string."""
    finish_reason: str
    """end, stop, length, context, time, repetition, error, or a criterion's own reason; see `Event.finish_reason`."""
    seed: int | None
    """Seed of the prompt, which reproduces the sample; None if nothing was drawn."""
    log_probs: list[float]
    """Log-probability of each generated token under the model, before any processor (nats)."""
    usage: Usage
    error: str | None = None
    """The error message, if finish_reason is error."""
    score: float | None = None
    """Beam search: the score that texts are ranked by; see `search.Hypothesis.score`."""
    complete: bool = True
    """Beam search: whether all of force_words appear."""
    missing: int = 0
    """Beam search: how many of num_return_sequences were not found for the prompt."""
    details: list[Details] | None = None
    """With top_logprobs: rank and alternatives of each token."""
    work: list[tuple[Stage, ...]] | None = None
    """With show_work: the candidates after each processor, for each token."""
    prompt_index: int = field(default=0, compare=False)
    """Index of the prompt in the call."""
    sample_index: int = field(default=0, compare=False)
    """Index of the sample among those of its prompt; with beam search, its rank."""


def completion_of(prompt_ids: list[int], events: Sequence[Event]) -> Completion:
    """The completion that the events of one row make."""
    told = [event for event in events if event.token is not None]
    return Completion(
        prompt_ids=prompt_ids,
        ids=[event.token for event in told],  # type: ignore[misc]
        text="".join(event.text for event in events),
        finish_reason=str(events[-1].finish_reason),
        seed=events[-1].seed,
        log_probs=[event.log_prob for event in told],  # type: ignore[misc]
        usage=Usage(len(prompt_ids), len(told)),
        error=events[-1].error,
        details=[event.details for event in told] if told and told[0].details else None,  # type: ignore[misc]
        work=[event.work for event in told] if told and told[0].work else None,
        prompt_index=events[-1].prompt,
        sample_index=events[-1].sample,
    )


def refusals(ids: list[list[int]], call: Call, refused: Iterable[int], context: int) -> Iterator[Completion]:
    """Completions with an error, for prompts that are longer than the context and may not leave it."""
    for n in refused:
        error = f"the prompt has {len(ids[n])} tokens, but the model's context is {context}"
        for sample in range(call.configs[n].num_return_sequences):
            yield Completion(
                prompt_ids=ids[n],
                ids=[],
                text="",
                finish_reason="error",
                seed=None,
                log_probs=[],
                usage=Usage(len(ids[n]), 0),
                error=error,
                prompt_index=call.first + n,
                sample_index=sample,
            )


def in_order(completions: Iterable[Completion], call: Call) -> Iterator[Completion]:
    """The completions in the order of prompts and samples, each as soon as those before it are there."""
    waiting: dict[tuple[int, int], Completion] = {}
    prompt, sample = call.first, 0
    for done in completions:
        waiting[done.prompt_index, done.sample_index] = done
        while (one := waiting.pop((prompt, sample), None)) is not None:
            yield one
            sample += 1
            if sample == max(1, call.configs[prompt - call.first].num_return_sequences - one.missing):
                prompt, sample = prompt + 1, 0
