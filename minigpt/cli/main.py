"""The command line: one verb a function. Each imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minigpt.cli.arguments import add_device, make_parser, parse, print_json, run_or_latest, split_positional
from minigpt.cli.lens import lens
from minigpt.cli.sae import sae
from minigpt.cli.sample import sample
from minigpt.cli.study import dynamics, heads, inspect, patch
from minigpt.errors import ConfigError, MinigptError, leave
from minigpt.terminal import show_what_can_be_shown, spelled

PROG = "minigpt"


def _parser(verb: str, positional: str = "") -> Any:
    return make_parser(f"{PROG} {verb}", VERBS[verb].__doc__ or "", positional)


def add_training_settings(parser: Any) -> None:
    """Every field of TrainConfig, with the model's derived ones left open until preset and sizes are known."""
    from minigpt.model.config import GPTConfig
    from minigpt.training.config import TrainConfig

    parser.add_class_arguments(TrainConfig)
    parser.set_defaults({f"model.{f.name}": f.default for f in fields(GPTConfig)})


# The verbs.


def train(argv: list[str]) -> None:
    """Train a model on text: minigpt train --config configs/NAME.yaml --data.source FILE. Without arguments it trains
    the default model on text that every Python installation carries.
    """
    from minigpt.training.config import TrainConfig

    parser = _parser("train")
    add_training_settings(parser)
    config = TrainConfig(**_fields(parse(parser, [*_stored_config(argv), *argv]), TrainConfig))
    from minigpt.training.launch import train as run_training

    run = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        _summarise(run)


def _fields(values: Any, kind: Any) -> dict[str, Any]:
    return {field.name: getattr(values, field.name) for field in fields(kind)}


def _stored_config(argv: list[str]) -> list[str]:
    """A run that goes on starts from its own stored config; what is given on the command line is laid over it."""
    found = {"run_name": "", "runs_dir": "runs", "resume": "auto"}
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and name in found:
            found[name] = value if equals else following
    run = Path(found["runs_dir"]) / found["run_name"]
    if not found["run_name"] or found["resume"] == "never":
        return []
    stored = run / "config.yaml"
    if not stored.is_file():  # every checkpoint carries a copy
        stored = max(run.glob("checkpoints/step-*/train_config.yaml"), default=stored)
    return ["--config", str(stored), *_settings_since(stored)] if stored.is_file() else []


def _settings_since(stored: Path) -> list[str]:
    """Flags for what a config stored by an older version does not say, so that the run goes on as it was."""
    import yaml

    from minigpt.checkpoint.formats import missing_settings

    try:
        values = yaml.safe_load(stored.read_text(encoding="utf-8"))
        return [f"--{name}={value}" for name, value in missing_settings(values).items()]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError):
        return []  # whoever reads it next says what is wrong with it


def _summarise(run: Path) -> None:
    """What a person wants to see of a run that is done: its losses, a sample, and how to go on."""
    from minigpt.training.run.metrics import read_metrics

    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("val/loss") is not None]
    samples = sorted((run / "samples").glob("step-*.txt"))
    if samples:
        print(f"\n--- sample ---\n{samples[-1].read_text(encoding='utf-8').strip()}\n--- end of sample ---")
    if rows:
        first, last = rows[0], rows[-1]
        print(
            f"\nvalidation loss {first['val/loss']:.3f} (step {first['step']}) -> {last['val/loss']:.3f} "
            f"(step {last['step']}), {last['val/bpb']:.3f} bits a byte, {last['seconds']:.0f} s of training"
        )
    print(f"run: {run}\nsample from it: python sample.py {run} --prompt 'your text'")


def prepare(argv: list[str]) -> None:
    """Tokenize a corpus into memory-mapped shards: minigpt prepare --data.source FILE --tokenizer.kind bpe. Training
    does this by itself; here it can be done before, and looked at.
    """
    from minigpt.training.config import TrainConfig

    parser = _parser("prepare")
    parser.add_class_arguments(TrainConfig, skip=set(_fields(TrainConfig(), TrainConfig)) - {"data", "tokenizer"})
    values = parse(parser, argv)
    from minigpt.data.shards import prepare as prepare_corpus

    corpus = prepare_corpus(values.data, values.tokenizer)
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        counts = corpus.counts[split]
        bytes_a_token = counts["bytes"] / max(1, len(stream))
        print(
            f"{split:5}  {counts['documents']:,} documents  {counts['bytes']:,} bytes  {len(stream):,} tokens "
            f"({bytes_a_token:.2f} bytes a token)"
        )
    print(f"vocabulary {corpus.tokenizer.vocab_size:,}  folder {corpus.folder}")


def evaluate(argv: list[str]) -> None:
    """Measure a model on held-out text: minigpt eval RUN. By default on the validation split of the corpus that it was
    trained on; --data.source takes another text, whole.
    """
    from minigpt.data.config import DataConfig

    path, rest = split_positional(argv)
    parser = _parser("eval", "[RUN]")
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    parser.set_defaults({"data.source": None, "data.folder": None})  # not given: the run's own
    parser.add_argument("--block_size", type=int, default=0, help="tokens a window; 0: the model's block_size")
    parser.add_argument("--tokens", type=int, default=0, help="evenly spaced tokens to measure on; 0: all")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, rest)

    from minigpt.checkpoint.checkpoint import load
    from minigpt.evaluation.text import evaluate_run
    from minigpt.model.device import pick_device

    data, folder = values.data, values.data.folder
    if data.source is not None:
        data = data if folder is not None else replace(data, folder=DataConfig.folder)
    elif replace(data, source=DataConfig.source, folder=DataConfig.folder) == DataConfig():
        data = None
    else:
        raise ConfigError("--data: is of another text than the run's own; add --data.source, or leave --data.* out")
    run = load(run_or_latest(path), device=pick_device(values.device))
    result, what = evaluate_run(run, data, values.block_size or None, values.tokens or None, folder)
    figures = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }
    if values.json:
        print_json({"checkpoint": str(run.path), "text": what, **figures})
    else:
        print(f"{run.path} on {what}: {result.tokens:,} tokens, {result.bytes:,} bytes")
        print(
            f"loss {result.loss:.4f} nats a token  perplexity {result.perplexity:.3f}  "
            f"{result.bits_per_byte:.4f} bits a byte"
        )


def info(argv: list[str]) -> None:
    """Say what a trained model is and costs: minigpt info RUN. Before it is trained, minigpt plan says it."""
    path, rest = split_positional(argv)
    parser = _parser("info", "[RUN]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, rest)
    from minigpt.checkpoint.checkpoint import read_config
    from minigpt.checkpoint.runs import read_checkpoint
    from minigpt.model.cost import cost_of
    from minigpt.terminal import readable

    model = read_checkpoint(run_or_latest(path), read_config)
    cost = cost_of(model)
    cache = cost.cache_bytes_per_token * model.block_size
    if values.json:
        figures = {"parameters": cost.parameters, "training_flops": cost.training_flops, **asdict(cost)}
        print_json({"model": model.to_dict(), **figures, "cache_bytes_per_row": cache})
        return
    for name, value in model.to_dict().items():
        print(f"{name:16} {value}")
    print(
        f"\nparameters       {cost.parameters:,} (embeddings {cost.embedding_parameters:,}, blocks "
        f"{cost.block_parameters:,}, unembedding {cost.unembedding_parameters:,})"
    )
    print(f"FLOPs a token    {readable(cost.forward_flops)} forward, {readable(cost.training_flops)} training")
    print(f"cache            {readable(cost.cache_bytes_per_token)}B a token, {readable(cache)}B a full row (float32)")


def plan(argv: list[str]) -> None:
    """Say what training will cost, before any time is spent: minigpt plan --config NAME --model.n_layer 6. Memory,
    operations, tokens, and the time that it takes here and on named GPUs.
    """
    from minigpt.training.config import TrainConfig

    parser = _parser("plan")
    add_training_settings(parser)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of a device's peak that is assumed")
    parser.add_argument(
        "--measure", type=bool | None, default=None, help="time a few steps here; null: where that is quick"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, argv)
    config = TrainConfig(**_fields(values, TrainConfig))
    from minigpt.training.plan.plan import make_plan, show

    figures = make_plan(config, values.utilisation, values.measure)
    if values.json:
        print_json(figures)
    else:
        print(show(figures))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "sample": sample,
    "prepare": prepare,
    "eval": evaluate,
    "info": info,
    "plan": plan,
    "inspect": inspect,
    "lens": lens,
    "heads": heads,
    "patch": patch,
    "dynamics": dynamics,
    "sae": sae,
}


def usage() -> str:
    """What `minigpt --help` prints."""
    lines = [f"usage: {PROG} VERB ...   ({PROG} VERB --help tells what a verb takes)", ""]
    for name, verb in VERBS.items():
        summary = re.sub(r"\s+", " ", verb.__doc__ or "").split(": ", 1)[0]
        lines.append(f"  {name:8} {summary}")
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> int:
    """Run one verb; returns the exit code (see errors.py). `--debug` shows the traceback of an error."""
    show_what_can_be_shown()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [item for item in arguments if item != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from minigpt import __version__

        print(f"{PROG} {__version__}")
        return 0
    try:
        verb = VERBS.get(arguments[0])
        if verb is None:
            near = get_close_matches(arguments[0], VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
            raise ConfigError(f"{arguments[0]}: no such verb; {hint}")
        verb(arguments[1:])
    except MinigptError as error:
        if debug:
            raise
        print(spelled(f"{PROG}: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\n{PROG}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone (| head): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from minigpt.model.device import told

        found = None if debug or arguments[0] == "train" else told(error)
        if found is None:
            raise
        print(f"{PROG}: {found[0]}", file=sys.stderr)
        return found[1]
    return 0


def run(*arguments: str) -> None:
    """Run the verb and leave the process with its exit code: what the scripts do.

    Args:
        arguments: in place of the command line's, if there are any.
    """
    code = main(arguments or None)
    if "minigpt.training.processes.processes" in sys.modules:  # it may have been one of several, or have launched them
        leave(code)
    sys.exit(code)
