"""Parsing with jsonargparse: dataclasses become flags and YAML keys; errors become one line with a suggestion."""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from minigpt.cli.plugins import described, own_settings
from minigpt.cli.typed import keys_of, read_typed, with_underscores
from minigpt.durable import json_text, named_path
from minigpt.errors import ConfigError
from minigpt.plugins import loaded, table

# Config fields that name a row of a table, with the table's kind.
FIELDS_WITH_TABLE = {
    "model.norm": "norm",
    "model.position": "position",
    "model.activation": "activation",
    "optimizer.name": "optimizer",
    "optimizer.schedule": "schedule",
    "tokenizer.kind": "tokenizer",
    "log": "logger",
}


def shipped(name: str, folder: str = "") -> Path | None:
    """Path of a shipped file configs/FOLDER/NAME, in the repository or in the wheel; None if there is none."""
    package = Path(__file__).parents[1]
    for root in (package / "_shipped", package.parent):
        for path in (root / "configs" / folder / name, root / "configs" / folder / f"{name}.yaml"):
            if path.is_file():
                return path
    return None


def shipped_in(folder: str = "") -> list[Path]:
    """The shipped files of configs/FOLDER/."""
    package = Path(__file__).parents[1]
    return next(
        (
            list((root / "configs" / folder).glob("*.yaml"))
            for root in (package / "_shipped", package.parent)
            if (root / "configs").is_dir()
        ),
        [],
    )


def make_parser(command: str, description: str, positional: str = "", folder: str = "") -> Any:
    """A jsonargparse parser for a command; our dataclasses' attribute docstrings become its help.

    --config finds shipped files in configs/FOLDER/ by their names.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Formatter(jsonargparse.DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text if "\n" in text else super()._fill_text(text, width, indent)

    parser = jsonargparse.ArgumentParser(
        prog=command,
        usage=f"{command}{' ' + positional if positional else ''} [--config FILE] [--name VALUE ...]",
        description=re.sub(r"\s+", " ", description),
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,  # else --optimizer.nam is taken for --optimizer.name
    )
    parser.shipped_folder = folder  # type: ignore[attr-defined]
    parser.epilog = ""
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        help="YAML file of settings, or the name of a shipped one; may be repeated",
    )
    if command.rpartition(" ")[2] not in ("train", "plan"):  # their configs have the field
        parser.add_argument(
            "--plugins", type=list[str], default=[], help="module or .py file to load first; runs its code; repeatable"
        )
    return parser


def parse(parser: Any, argv: list[str], positionals: list[str] | None = None) -> Any:
    """Parse arguments. Flags override the files of --config, and later files earlier ones.

    Args:
        parser: from `make_parser`; `parser.given` becomes the set of the settings that were given, and `parser.preset`
            the set of those that only a shipped config gives.
        argv: the arguments; typed.py has the forms that they may have.
        positionals: receives the arguments that are no flags; None if there must be none.

    Raises:
        ConfigError: of one line, which suggests the closest valid name.
    """
    import argparse

    argv = with_underscores(argv)
    argv = [
        _shipped_config(previous, item, parser.shipped_folder)
        for previous, item in zip(["", *argv], argv, strict=False)
    ]
    describe_choices(parser)
    typed = read_typed(parser, own_settings(parser, argv))
    if typed.positionals and positionals is None:
        raise ConfigError(f"{typed.positionals[0]}: not a flag; see {parser.prog} --help")
    if positionals is not None:
        positionals.extend(typed.positionals)
    ours = set(shipped_in(parser.shipped_folder))
    in_files = [(path in ours, set(keys_of(settings))) for path, settings in typed.configs]
    parser.given = typed.given
    parser.preset = set().union(*(keys for preset, keys in in_files if preset)) - typed.by_flags
    parser.preset -= set().union(*(keys for preset, keys in in_files if not preset))
    configs = [f"--config={yaml.safe_dump(settings, allow_unicode=True)}" for _, settings in typed.configs]
    try:
        return parser.instantiate(parser.parse_args([*configs, *typed.flags]))
    except argparse.ArgumentError as error:
        if isinstance(error.__context__, ConfigError):
            raise error.__context__ from error
        message = _explain(parser, str(error))
        name = re.match(r'"([\w.]+)"|--([\w.]+)', message)
        for path, settings in typed.configs:
            if name and (name[1] or name[2]) in set(keys_of(settings)):
                message = f"--config {path}: {message}"
                break
        raise ConfigError(message) from error


def describe_choices(parser: Any) -> None:
    """Add to the help the names that each choice has, and the flags of plug-ins."""
    for action in parser._actions:
        field = FIELDS_WITH_TABLE.get(action.dest)
        if field is not None and action.help and "%(" not in action.help:
            action.help = f"{action.help.rstrip('.')}: {table(field).described()}".replace("%", "%%")
    parser.epilog = described(parser)


def _shipped_config(previous: str, item: str, folder: str) -> str:
    """Resolve --config NAME to a shipped config if there is no file of that name."""
    flag, equals, value = item.partition("=")
    if previous != "--config" and (flag != "--config" or not equals):
        return item
    name = item if previous == "--config" else value
    if not name or not Path(name).exists():
        found = shipped(Path(name).name, folder) if name else None
        if found is None:
            names = sorted(path.stem for path in shipped_in(folder))
            raise ConfigError(
                f"--config {name or repr(name)}: there is no such file; expected one, or one of {', '.join(names)}"
            )
        name = str(found)
    return name if previous == "--config" else f"--config={name}"


def _explain(parser: Any, message: str) -> str:
    message = re.sub(r"\s+", " ", message).strip()
    message = message.replace("typing.Literal", "one of ").replace("<class 'int'>", "whole number")
    message = message.replace("<class 'float'>", "number").replace("<class 'str'>", "text").replace("Parser key ", "")
    message = message.replace("Expected a one of", "Expected one of")
    message = message.replace("<class 'list'>", "list such as '[a, b]'")
    message = re.sub(r"(typing\.)?Optional\[(.*?)\]", r"\2 or null", message)
    several = r"^(.*?): Does not validate against any of the Union .*? Subtypes: \[(.*)\] Errors.* value: (.*)$"
    if union := re.search(several, message):
        kinds = union[2].replace(", <class 'NoneType'>", " or null")
        message = f"{union[1]}: Expected {kinds}. Got value: {union[3]}"
    if re.search(r": Expected text\b.* Got value: [^ ]+$", message):
        message += "; put it into quotes, so that YAML takes it for text"
    unknown = (
        re.search(r"unrecognized arguments: --?([\w.-]+)", message)
        or re.search(r"[Oo]ption '([\w.]+)' is not accepted", message)
        or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>\w+)'", message)
    )
    if unknown:
        name = ".".join(unknown.groups())
        known = [key for key in parser.get_defaults().keys() if key != "config"]  # noqa: SIM118 - a Namespace
        near = get_close_matches(name, known, n=1, cutoff=0.5) or get_close_matches(
            name.rpartition(".")[2], [key.rpartition(".")[2] for key in known], n=1
        )
        hint = next((key for key in known if near and (key == near[0] or key.endswith(f".{near[0]}"))), None)
        return f"--{name}: no such setting" + (f"; did you mean --{hint}?" if hint else f"; see {parser.prog} --help")
    return message


def print_json(value: Any, **style: Any) -> None:
    """Print one JSON object in one line, with \\uXXXX for what standard output's encoding lacks."""
    print(json_text(value, getattr(sys.stdout, "encoding", None) or "utf-8", **style), flush=True)


def latest_run(folder: str = "runs") -> Path:
    """The run trained last in `folder`, used if no run is given."""
    runs = [path for path in Path(folder).glob("*") if any((path / "checkpoints").glob("step-*"))]
    if not runs:
        raise ConfigError(
            f"no run given, and {folder}/ holds none; train one first, or give a run or checkpoint folder"
        )
    return max(runs, key=lambda run: (run / "checkpoints").stat().st_mtime)


def run_or_latest(path: str | None) -> Path:
    """The given RUN, or the one trained last. Raises ConfigError for an empty string."""
    return latest_run() if path is None else named_path(path, "a run, or nothing for the one trained last")


def split_positional(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split the leading RUN from the flags. Raises ConfigError if it comes after them."""
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if argv and not argv[-1].startswith("-") and Path(argv[-1]).is_dir() and not argv[-2:-1][0].startswith("-"):
        raise ConfigError(f"{argv[-1]}: RUN comes first, before the flags")
    return None, argv


def add_device(parser: Any) -> None:
    """The flag that `minigpt.model.device.pick_device` reads."""
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda or mps; auto: a GPU if there is one")


def add_training_settings(parser: Any) -> None:
    """Add every field of TrainConfig; the model's derived fields stay None until preset and sizes are known."""
    from minigpt.model.config import GPTConfig
    from minigpt.training.config import TrainConfig

    parser.add_class_arguments(TrainConfig)
    parser.set_defaults({"plugins": list(loaded())})
    parser.set_defaults({f"model.{f.name}": f.default for f in fields(GPTConfig) if f.default is not MISSING})


def fields_of(values: Any, kind: Any) -> dict[str, Any]:
    """The fields of a dataclass among parsed values."""
    return {field.name: getattr(values, field.name) for field in fields(kind)}
