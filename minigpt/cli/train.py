"""The verb train: start or resume a run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from minigpt.cli.arguments import add_training_settings, fields_of, make_parser, parse
from minigpt.plugins import loaded, naming


def train(argv: list[str]) -> None:
    """Train a model on text: minigpt train --config NAME --data.source FILE. Without arguments, trains the default
    model on Python's help text. With the --run_name of an existing run, resumes it.
    """
    from minigpt.training.config import TrainConfig

    parser = make_parser("minigpt train", train.__doc__ or "")
    add_training_settings(parser)
    stored = _stored_config(argv)
    with naming(_plugins_of(stored)):
        config = TrainConfig(**fields_of(parse(parser, [*stored, *argv]), TrainConfig))
        config = replace(config, plugins=list(loaded()))  # those of a stored config are not loaded
        config.check()
    from minigpt.training.launch import train as run_training

    run = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        _summarise(run)


def _stored_config(argv: list[str]) -> list[str]:
    """A run that is resumed starts from its stored config; flags override it."""
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


def _plugins_of(stored: list[str]) -> list[str]:
    """The plug-ins that a stored run used, by name; for the message that one is missing."""
    import yaml

    try:
        values = yaml.safe_load(Path(stored[1]).read_text(encoding="utf-8"))
        return [str(name) for name in values.get("plugins") or []]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError):
        return []


def _settings_since(stored: Path) -> list[str]:
    """Flags for settings that a config of an older version lacks, with the values that the run was started with."""
    import yaml

    from minigpt.checkpoint.formats import missing_settings

    try:
        values = yaml.safe_load(stored.read_text(encoding="utf-8"))
        return [f"--{name}={value}" for name, value in missing_settings(values).items()]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError):
        return []  # whoever reads it next says what is wrong with it


def _summarise(run: Path) -> None:
    """Print the losses of a finished run, its last sample, and how to sample from it."""
    from minigpt.training.run.metrics import read_metrics

    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("val/loss") is not None]
    samples = sorted((run / "samples").glob("step-*.txt"))
    if samples:
        print(f"\n--- sample ---\n{samples[-1].read_text(encoding='utf-8').strip()}\n--- end of sample ---")
    if rows:
        first, last = rows[0], rows[-1]
        print(
            f"\nvalidation loss {first['val/loss']:.3f} (step {first['step']}) -> {last['val/loss']:.3f} "
            f"(step {last['step']}), {last['val/bpb']:.3f} bits per byte, {last['seconds']:.0f} s of training"
        )
    print(f"run: {run}\nsample from it: python sample.py {run} --prompt 'your text'")
