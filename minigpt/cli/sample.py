"""The verb sample: generate text, show how each token is chosen, or score a given text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.cli.arguments import add_device, make_parser, parse, run_or_latest
from minigpt.cli.prompts import read_prompts
from minigpt.cli.results import Rows
from minigpt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from minigpt.model.gpt import GPT
    from minigpt.sampling.settings.config import SamplingConfig


def sample(argv: list[str]) -> None:
    """Generate text: minigpt sample RUN [PROMPT ...]. RUN is a run, a checkpoint folder or a Hugging Face
    GPT-2 or Llama folder; by default the run trained last. Text that is piped in is the prompt if none is given.
    --config takes a YAML file, a generation_config.json, or greedy, precise, creative, beam or llama_cpp_defaults.
    """
    parser, typed = _parser(), []  # type: ignore[var-annotated]
    values = parse(parser, argv, typed)
    path, prompts = typed[0] if typed else None, read_prompts(values, typed[1:])
    if len(typed) == 1 and not Path(typed[0]).exists() and "/" not in typed[0]:
        raise CheckpointError(f"{typed[0]}: no such folder; the run comes first: minigpt sample RUN PROMPT")
    config, seeds = _settings(parser.given, parser.preset, values, run_or_latest(path), len(prompts))
    _check_flags(values, config, len(prompts))
    rows = _rows(values, prompts)

    # oneDNN keeps the code that it generates for each number of rows, up to 1024 pieces; rows leave a batch one by one.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    from minigpt.model.device import pick_device

    device = pick_device(values.device, float64=True)

    from minigpt.cli import sampling
    from minigpt.model.fast import fast
    from minigpt.sampling.loop.room import MOST_ROWS
    from minigpt.sampling.run import load
    from minigpt.sampling.sampler import Sampler
    from minigpt.terminal import hushed

    run = load(run_or_latest(path), device="cpu")
    together = len(prompts) * max(config.num_beams, config.num_return_sequences)
    on_device = run.model.to(device)
    model: Any = _steered(on_device, values)
    if model is None:
        model = fast(on_device, min(together, config.max_rows or MOST_ROWS), compiled=values.compile)
    with hushed():  # settings without effect were named before the model was loaded
        sampler = Sampler(model, run.tokenizer, config)
    if values.show_order:
        sampling.print_order(sampler)
    elif values.score:
        sampling.score(sampler, prompts, values)
    elif values.continuation is not None:
        sampling.replay(sampler, prompts, values)
    elif values.show_work and not values.json and rows is None:
        sampling.show_work(sampler, prompts[0], values.show_work, seeds)
    elif together == 1 and not values.json and rows is None:
        sampling.stream(sampler, prompts[0], seeds)
    else:
        sampling.write(sampler, prompts, seeds, values, rows)


def _parser() -> Any:
    from minigpt.sampling.settings.config import SamplingConfig
    from minigpt.sampling.settings.names import our_flag

    parser = make_parser("minigpt sample", sample.__doc__ or "", "[RUN] [PROMPT ...]", folder="sampling")
    parser.add_argument(
        "--prompt",
        action="append",
        help="prompt; repeatable; '-' is standard input (default: the text piped in, or empty)",
    )
    parser.add_argument("--prompt_ids", type=list[list[int]], help="prompt as token ids, such as 1,2,3; repeatable")
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
    parser.add_argument("--show_work", nargs="?", const=5, default=0, type=int, metavar="N", help=told)
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
    parser.add_argument("--output", type=str, help="write the samples to this file, one JSON object a line")
    parser.add_argument(
        "--resume_from", type=str, help="go on after the samples in this file, which --output wrote, and append to it"
    )
    parser.add_argument(
        "--unordered", action="store_true", help="write each sample when it ends, not in the order of the prompts"
    )
    parser.add_class_arguments(SamplingConfig)
    parser.translate = translated
    parser.other_names = our_flag
    return parser


def translated(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a file under our names; a generation_config.json is read as one."""
    from minigpt.sampling.settings.config import FIELDS, SamplingConfig
    from minigpt.sampling.settings.names import TAKEN, ours

    if "transformers_version" in values or "_from_model_config" in values:
        return SamplingConfig.fields_in(values)
    twice = {TAKEN[key] for key in values if key in TAKEN}
    theirs = {key: value for key, value in values.items() if key in TAKEN or key in twice}
    try:
        named = ours(theirs, FIELDS)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return {**{key: value for key, value in values.items() if key not in theirs}, **named}


def _settings(
    given: set[str], quiet: set[str], values: Any, path: Path, count: int
) -> tuple[SamplingConfig, list[int | None] | None]:
    """The settings, and the seeds of the prompts if there is a list of them. In falling order of precedence: flags,
    --config, the checkpoint's own, defaults. Nothing heavy is imported, so that a mistake is told at once. `quiet` are
    settings about which nothing is said if they have no effect.
    """
    from minigpt.checkpoint.foreign import read_sampling
    from minigpt.checkpoint.runs import read_checkpoint
    from minigpt.sampling.settings.config import FIELDS, SamplingConfig, check_field
    from minigpt.sampling.settings.conflicts import switched_on
    from minigpt.sampling.settings.needs import name_without_effect

    folder, record = read_checkpoint(path, lambda found: (found, read_sampling(found)))
    stored = SamplingConfig.fields_in(record)
    own = {name: getattr(values, name) for name in FIELDS if name in given}
    if "extra" in own:
        own["extra"] = {**stored.get("extra", {}), **own["extra"]}
    seeds = own.get("seed") if isinstance(own.get("seed"), list) else None
    if seeds is not None:
        if len(seeds) != count:
            raise ConfigError(
                f"--seed: has {len(seeds)} values for {count} prompts; give one per prompt, or one for all"
            )
        for seed in seeds:
            check_field("seed", seed)
        own["seed"] = None
    config = SamplingConfig(**{**stored, **own})
    try:
        config.validate()
    except ConfigError as error:
        ours = [name for name in stored if name not in own and re.search(rf"\b{name}\b", str(error))]
        if not ours:
            raise
        file = next((f for f in ("generation_config.json", "config.json") if (folder / f).is_file()), "")
        hint = f"{' and '.join(ours)} {'is' if len(ours) == 1 else 'are'} set in {folder / file}; a flag overrides it"
        raise ConfigError(f"{error} ({hint})") from error
    name_without_effect(config, switched_on(config), set(own) - quiet)
    return config, seeds


def _check_flags(values: Any, config: Any, prompts: int) -> None:
    """Raise ConfigError for combinations in which a flag would have no effect."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", values.device):
        raise ConfigError(f"--device {values.device}: expected auto, cpu, cuda, cuda:1 or mps")
    if values.show_work < 0:
        raise ConfigError(f"--show_work {values.show_work}: expected a whole number, 0 or more")
    if values.stride is not None and not values.score:
        raise ConfigError(f"--stride {values.stride}: is for --score; add it, or leave --stride out")
    if values.steer_scale is not None and values.steer is None:
        raise ConfigError(f"--steer_scale {values.steer_scale}: is for --steer; add it, or leave --steer_scale out")
    if values.steer is not None and values.compile:
        raise ConfigError("--compile: does not work with --steer; remove one of them")
    if values.score and (values.continuation is not None or values.show_work):
        raise ConfigError("--score: generates nothing; remove --continuation and --show_work")
    file = values.output or values.resume_from
    if values.output and values.resume_from:
        raise ConfigError("--output and --resume_from: give one of them; --resume_from appends to its file")
    if file and (values.score or values.continuation is not None or values.show_order):
        raise ConfigError(f"--output {file}: holds generated samples; remove --score, --continuation and --show_order")
    told_in_json = values.json or values.show_order or file
    if config.top_logprobs is not None and not told_in_json:
        raise ConfigError("--top_logprobs: is shown in JSON only; add --json, or use --show_work")
    alone = prompts == 1 and config.num_return_sequences == 1 and config.num_beams == 1
    if values.show_work and not (alone or values.json or values.continuation is not None):
        raise ConfigError("--show_work: shows one text while it is generated; give one prompt, one sample and no beams")


def _rows(values: Any, prompts: list[Any]) -> Rows | None:
    """The file of --output or --resume_from."""
    path = values.output or values.resume_from
    return Rows(path, prompts, continues=values.resume_from is not None) if path else None


def _steered(model: GPT, values: Any) -> Any:
    if values.steer is None:
        return None
    from minigpt.internals.features.steering import Steered, Steering
    from minigpt.internals.study import Study

    return Steered(Study.of(model), Steering.load(values.steer).edits(values.steer_scale))
