"""What `minigpt sample` does with a sampler: generate, show, score."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from minigpt.cli.arguments import print_json
from minigpt.cli.results import Rows, heading, is_terminal, jsonable, print_row, tell_shortfalls
from minigpt.errors import ConfigError
from minigpt.sampling import show
from minigpt.sampling.loop.loop import Event
from minigpt.terminal import notice, progress

if TYPE_CHECKING:
    from minigpt.sampling.completion import Completion
    from minigpt.sampling.sampler import Sampler

Seeds = list[int | None] | None


def stream(sampler: Sampler, prompt: Any, seeds: Seeds) -> None:
    """Print one text while it is generated."""
    events = sampler.stream([prompt], **_with(seeds))  # reports an unusable prompt before anything is printed
    print(_text(prompt, sampler), end="", flush=True)
    for event in events:
        print(event.text, end="", flush=True)
    print()
    if event.error:
        raise ConfigError(event.error)


def show_work(sampler: Sampler, prompt: Any, count: int, seeds: Seeds) -> None:
    """Print the candidates of each token of one text while it is generated."""
    for event in sampler.stream([prompt], show_work=count, **_with(seeds)):
        if event.token is not None:
            print(show.show_work(event, sampler.tokenizer), flush=True)
        if event.error:
            raise ConfigError(event.error)


def write(sampler: Sampler, prompts: list[Any], seeds: Seeds, values: Any, rows: Rows | None) -> None:
    """Write the samples of all prompts as they end."""
    samples = sampler.config.num_return_sequences
    left = list(range(len(prompts))) if rows is None else rows.left(prompts, samples)
    seed = sampler.config.seed
    if seeds is None and isinstance(seed, int):
        seeds = [(seed + index) % 2**64 for index in range(len(prompts))]
    own = None if seeds is None else [seeds[index] for index in left]
    completions = sampler.iterate(
        [prompts[index] for index in left], show_work=values.show_work, unordered=values.unordered, **_with(own)
    )
    total, failed, short = len(prompts) * samples, [], []
    done = total - len(left) * samples
    bar_shown = total > 1 and (rows is not None or not is_terminal())
    try:
        with progress("sampling", total, "samples", start=done, show=bar_shown) as bar:
            for completion in completions:
                completion = _renumbered(completion, left)
                _write_one(prompts[completion.prompt_index], completion, sampler, values, rows, len(prompts))
                done += 1
                bar.update(done)
                if completion.error:
                    failed.append(completion)
                elif completion.missing or not completion.complete:
                    short.append(completion)
    except KeyboardInterrupt:
        if rows is not None:
            notice(f"\n{done} of {total} samples are in {rows.path}; go on with --resume_from {rows.path}")
        raise
    tell_shortfalls(short, samples)
    if failed:
        first = failed[0]
        raise ConfigError(
            f"{len(failed)} of {total} samples ended in an error; the first, of prompt {first.prompt_index + 1}: "
            f"{first.error}"
        )


def _write_one(
    prompt: Any, completion: Completion, sampler: Sampler, values: Any, rows: Rows | None, count: int
) -> None:
    if rows is not None:
        if (completion.prompt_index, completion.sample_index) not in rows.done:
            rows.write(prompt, completion)
    elif values.json:
        print_row(prompt, completion)
    else:
        told = heading(completion, count, sampler.config.num_return_sequences)
        print(f"{told}\n{_text(prompt, sampler)}{completion.text}", flush=True)


def _renumbered(completion: Completion, left: list[int]) -> Completion:
    """The completion with the index of its prompt in the command."""
    return replace(completion, prompt_index=left[completion.prompt_index])


def replay(sampler: Sampler, prompts: list[Any], values: Any) -> None:
    """Print the log-probabilities of a given continuation of each prompt."""
    completions = sampler.replay(prompts, [values.continuation] * len(prompts), show_work=values.show_work)
    for prompt, completion in zip(prompts, completions, strict=True):
        if values.json:
            print_row(prompt, completion)
            continue
        for token, work in zip(completion.ids, completion.work or (), strict=False):
            print(show.show_work(Event(0, 0, 0, token, work=work), sampler.tokenizer))
        _print_tokens(sampler, completion)


def score(sampler: Sampler, prompts: list[Any], values: Any) -> None:
    """Print the log-probabilities of the prompts."""
    top = sampler.config.top_logprobs or 0
    for prompt, told in zip(prompts, sampler.score(prompts, stride=values.stride, top=top, show=True), strict=True):
        if values.json:
            figures = {"perplexity": told.perplexity, "bits_per_byte": told.bits_per_byte, "total": told.total}
            print_json(jsonable({"prompt": prompt, **figures, **asdict(told)}), allow_nan=False)
            continue
        for token, log_prob, rank in zip(told.ids, told.log_probs, told.ranks, strict=True):
            if log_prob is not None:
                print(f"{log_prob:9.4f}  rank {rank:<6} {sampler.tokenizer.decode([token])!r}")
        if not told.count:
            print("0 tokens to score")
            continue
        print(
            f"{told.count} tokens  {told.total:.4f} nats  perplexity {told.perplexity:.4f}  "
            f"{told.bits_per_byte:.4f} bits per byte"
        )


def print_order(sampler: Sampler) -> None:
    """Print the processors in their order."""
    processors, order = sampler.processors_for()
    name = sampler.config.order if isinstance(sampler.config.order, str) else "own"
    print(f"order {name}: beams feed {order.feed.replace('_', '-')} to the processors")
    for processor in processors:
        print(f"  {processor}")


def _with(seeds: Seeds) -> dict[str, Any]:
    return {} if seeds is None else {"seed": seeds}


def _print_tokens(sampler: Sampler, completion: Completion) -> None:
    print("  model's   after processors   rank")
    for token, log_prob, details in zip(completion.ids, completion.log_probs, completion.details or [], strict=True):
        print(
            f"{log_prob:9.4f}  {details.processed_log_prob:17.4f}   {details.rank:<6} "
            f"{sampler.tokenizer.decode([token])!r}"
        )
    print(f"{sum(completion.log_probs):9.4f}  nats in all")


def _text(prompt: Any, sampler: Sampler) -> str:
    return prompt if isinstance(prompt, str) else sampler.tokenizer.decode(prompt)
