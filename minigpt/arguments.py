"""Parsing: dataclasses to flags and YAML files by jsonargparse, and its errors made into one line that helps."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minigpt.errors import ConfigError


def shipped(name: str) -> Path | None:
    """A file that comes with minigpt (configs/NAME): from the repository, or from the wheel."""
    package = Path(__file__).parent
    for root in (package / "_shipped", package.parent):
        for path in (root / "configs" / name, root / "configs" / f"{name}.yaml"):
            if path.is_file():
                return path
    return None


def make_parser(command: str, description: str, positional: str = "") -> Any:
    """A jsonargparse parser for a command; our dataclasses' attribute docstrings become its help."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=command,
        usage=f"{command}{' ' + positional if positional else ''} [--config FILE] [--name VALUE ...]",
        description=re.sub(r"\s+", " ", description),
        exit_on_error=False,
    )
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file of values; may be repeated")
    return parser


def parse(parser: Any, argv: list[str]) -> Any:
    """Parse, and turn jsonargparse's errors into one line that names the nearest field."""
    import argparse

    argv = [_shipped_config(previous, item) for previous, item in zip(["", *argv], argv, strict=False)]
    try:
        return parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(parser, str(error))) from error


def _shipped_config(previous: str, item: str) -> str:
    """--config NAME may name a shipped config where no file of that name is there."""
    flag, _, value = item.partition("=")
    if previous == "--config" and not Path(item).exists():
        return str(shipped(Path(item).name) or item)
    if flag == "--config" and value and not Path(value).exists():
        return f"--config={shipped(Path(value).name) or value}"
    return item


def _explain(parser: Any, message: str) -> str:
    message = re.sub(r"\s+", " ", message).strip()
    message = message.replace("typing.Literal", "one of ").replace("<class 'int'>", "whole number")
    message = message.replace("<class 'float'>", "number").replace("<class 'str'>", "text").replace("Parser key ", "")
    message = re.sub(r"(typing\.)?Optional\[(.*?)\]", r"\2 or null", message)
    several = r"^(.*?): Does not validate against any of the Union .*? Subtypes: \[(.*)\] Errors.* value: (.*)$"
    if union := re.search(several, message):
        kinds = union[2].replace(", <class 'NoneType'>", " or null")
        message = f"{union[1]}: Expected {kinds}. Got value: {union[3]}"
    unknown = (
        re.search(r"unrecognized arguments: --?([\w.]+)", message)
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
