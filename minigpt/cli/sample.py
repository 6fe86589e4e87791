"""The verb sample: generate text, show how each token is chosen, or score a given text."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from minigpt.cli.arguments import add_device, make_parser, parse, print_json, run_or_latest, split_positional
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.model.gpt import GPT
    from minigpt.sampling.sampler import Completion, Sampler


def sample(argv: list[str]) -> None:
    """Generate text: minigpt sample RUN --prompt TEXT. RUN is a run, a checkpoint folder or a Hugging Face
    GPT-2 or Llama folder; by default the run trained last. --config takes a YAML file, or greedy, precise, creative,
    beam or llama_cpp_defaults.
    """
    from minigpt.sampling.settings.config import SamplingConfig

    path, rest = split_positional(argv)
    parser = make_parser("minigpt sample", sample.__doc__ or "", "[RUN]", folder="sampling")
    parser.add_argument(
        "--prompt", action="append", help="prompt; repeat the flag for several prompts (default: empty)"
    )
    parser.add_argument("--prompt_ids", type=list[int], help="prompt as token ids, such as [1,2,3]")
    parser.add_argument("--prompt_file", type=str, help="file that holds the prompt; '-' is standard input")
    parser.add_argument("--prompt_lines", type=str, help="file with one prompt per line; '-' is standard input")
    parser.add_argument(
        "--continuation", type=str, help="generate nothing: show the log-probability of each token of this continuation"
    )
    parser.add_argument(
        "--score", action="store_true", help="generate nothing: show the log-probability of each token of the prompt"
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="with --score: step of the sliding window, in tokens, for texts longer than the context",
    )
    told = "show the probabilities of the N (default 5) most likely tokens after each processor"
    parser.add_argument("--show_work", "--show-work", nargs="?", const=5, default=0, type=int, metavar="N", help=told)
    parser.add_argument("--show_order", action="store_true", help="print the processors in their order and exit")
    parser.add_argument(
        "--compile", action="store_true", help="compile the model with torch.compile; worth it for many tokens"
    )
    parser.add_argument(
        "--steer", type=str, help="file with a steering vector, added to the activations of every token"
    )
    parser.add_argument(
        "--steer_scale", type=float, help="with --steer: factor of the vector (default: the one in the file)"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")
    parser.add_class_arguments(SamplingConfig)
    parse(parser, rest)  # report a mistake before anything is loaded

    from minigpt.checkpoint.checkpoint import load
    from minigpt.model.device import pick_device
    from minigpt.model.fast import fast
    from minigpt.sampling.sampler import Sampler

    run = load(run_or_latest(path), device="cpu")
    stored = SamplingConfig.from_dict(run.sampling)
    parser.set_defaults({field.name: getattr(stored, field.name) for field in fields(stored)})
    values = parse(parser, rest)
    config = SamplingConfig(**{field.name: getattr(values, field.name) for field in fields(SamplingConfig)})
    config.validate()
    _check_flags(values, config)
    prompts = _prompts(values)
    together = len(prompts) * max(config.num_beams, config.num_return_sequences)
    rows = min(together, config.max_rows or together)
    on_device = run.model.to(pick_device(values.device, float64=True))
    plain = values.steer is None
    model: Any = fast(on_device, rows, compiled=values.compile) if plain else _steered(on_device, values)
    sampler = Sampler(model, run.tokenizer, config)
    if values.show_order:
        _print_order(sampler)
    elif values.score:
        _score(sampler, prompts, values)
    elif values.continuation is not None:
        from minigpt.sampling.loop.loop import Event
        from minigpt.sampling.show import show_work

        completions = sampler.replay(prompts, [values.continuation] * len(prompts), show_work=values.show_work)
        for prompt, completion in zip(prompts, completions, strict=True):
            if values.json:
                _print_json(prompt, asdict(completion))
                continue
            for token, work in zip(completion.ids, completion.work or (), strict=False):
                print(show_work(Event(0, 0, 0, token, work=work), sampler.tokenizer))
            _print_tokens(sampler, completion)
    else:
        _write(sampler, prompts, config, values)


def _check_flags(values: Any, config: Any) -> None:
    """Raise ConfigError for combinations in which a flag would have no effect."""
    if values.show_work < 0:
        raise ConfigError(f"--show_work {values.show_work}: expected a whole number, 0 or more")
    if values.stride is not None and not values.score:
        raise ConfigError(f"--stride {values.stride}: is for --score; add it, or leave --stride out")
    if values.steer_scale is not None and values.steer is None:
        raise ConfigError(f"--steer_scale {values.steer_scale}: is for --steer; add it, or leave --steer_scale out")
    if values.steer is not None and values.compile:
        raise ConfigError("--compile: what is steered runs step by step; leave --compile or --steer out")
    if values.score and (values.continuation is not None or values.show_work):
        raise ConfigError("--score: writes nothing, so it goes neither with --continuation nor with --show_work")
    if config.top_logprobs is not None and not (values.json or values.show_order):
        raise ConfigError("--top_logprobs: is told in JSON; add --json, or see --show_work")


def _steered(model: GPT, values: Any) -> Any:
    from minigpt.internals.features.steering import Steered, Steering
    from minigpt.internals.study import Study

    return Steered(Study.of(model), Steering.load(values.steer).edits(values.steer_scale))


def _write(sampler: Sampler, prompts: list[Any], config: Any, values: Any) -> None:
    if values.json:
        results = sampler.generate(prompts, show_work=values.show_work)
        for prompt, completions in zip(prompts, results, strict=True):
            for completion in completions:
                _print_json(prompt, asdict(completion))
        _fail_if_any(results)
        return
    alone = len(prompts) == 1 and config.num_return_sequences == 1 and config.num_beams == 1
    if alone and values.show_work:
        from minigpt.sampling.show import show_work

        for event in sampler.stream(prompts, show_work=values.show_work):
            if event.token is not None:
                print(show_work(event, sampler.tokenizer), flush=True)
            if event.error:
                raise ConfigError(event.error)
        return
    if values.show_work:
        raise ConfigError("--show_work: shows one text as it is written; give one prompt, one sample and no beams")
    if alone:
        events = sampler.stream(prompts)  # a prompt that cannot be used is told before anything is printed
        print(_text(prompts[0], sampler), end="", flush=True)
        for event in events:
            print(event.text, end="", flush=True)
        print()
        if event.error:
            raise ConfigError(event.error)
        return
    results = sampler.generate(prompts)
    for prompt, completions in zip(prompts, results, strict=True):
        for number, done in enumerate(completions, 1):
            of = f"{number} of {len(completions)}"
            of += f" found, {config.num_return_sequences} asked for" if done.missing else ""
            told = f"seed {done.seed}" if done.seed is not None else ""
            told = ", ".join(filter(None, (told, "" if done.score is None else f"score {done.score:.4f}", done.error)))
            print(f"--- {of} ({told}) ---\n{_text(prompt, sampler)}{done.text}")

    _fail_if_any(results)


def _fail_if_any(results: list[list[Completion]]) -> None:
    """Raise ConfigError if a text ended in an error; all have been printed."""
    failed = [(number, done.error) for number, each in enumerate(results) for done in each if done.error]
    if failed:
        raise ConfigError(f"{len(failed)} texts ended in an error; the first, of prompt {failed[0][0]}: {failed[0][1]}")


def _score(sampler: Sampler, prompts: list[Any], values: Any) -> None:
    top = sampler.config.top_logprobs or 0
    for prompt, score in zip(prompts, sampler.score(prompts, stride=values.stride, top=top, show=True), strict=True):
        if values.json:
            figures = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte, "total": score.total}
            _print_json(prompt, {**figures, **asdict(score)})
            continue
        for token, log_prob, rank in zip(score.ids, score.log_probs, score.ranks, strict=True):
            if log_prob is not None:
                print(f"{log_prob:9.4f}  rank {rank:<6} {sampler.tokenizer.decode([token])!r}")
        print(
            f"{score.count} tokens  {score.total:.4f} nats  perplexity {score.perplexity:.4f}  "
            f"{score.bits_per_byte:.4f} bits per byte"
        )


def _print_order(sampler: Sampler) -> None:
    processors, order = sampler.processors_for()
    name = sampler.config.order if isinstance(sampler.config.order, str) else "own"
    print(f"order {name}: beams feed {order.feed.replace('_', '-')} to the processors")
    for processor in processors:
        print(f"  {processor}")


def _print_json(prompt: Any, told: dict[str, Any]) -> None:
    print_json(_jsonable({"prompt": prompt, **told}), allow_nan=False)


def _jsonable(value: Any) -> Any:
    """Named tuples by their names; null for what JSON has no number for: log 0, the perplexity of nothing."""
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def _prompts(values: Any) -> list[Any]:
    given = {
        name: getattr(values, name)
        for name in ("prompt", "prompt_ids", "prompt_file", "prompt_lines")
        if getattr(values, name) is not None
    }
    from minigpt.data.reading import read_text
    from minigpt.tokenizer.base import well_formed

    if len(given) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in given)}: give one of them")
    if values.prompt_ids is not None:
        if not values.prompt_ids:
            raise ConfigError("--prompt_ids: holds no token id; give at least one, or leave it out")
        return [values.prompt_ids]
    if values.prompt_file is not None:
        return [read_text("--prompt_file", values.prompt_file)]
    if values.prompt_lines is not None:
        text = read_text("--prompt_lines", values.prompt_lines)
        lines = text.removesuffix("\n").split("\n")  # and at nothing else that is a line break to some
        if not text:
            raise ConfigError(f"--prompt_lines {values.prompt_lines}: holds no line; give one prompt a line")
        return [line.removesuffix("\r") for line in lines]
    return [well_formed(prompt) for prompt in values.prompt or [""]]
