"""What people type, made into what the parser takes.

--top-p .9            --top_p=.9                   hyphens in names
--ignore_eos          --ignore_eos=true            a switch without a value
--stop a --stop b     --stop=["a", "b"]            a list, repeated or as 1,2,3
--max_new_tokens 1e3  --max_new_tokens=1000        numbers as Python writes them
--config FILE         comes first, whatever its place, so that flags override it
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

import yaml

from minigpt.errors import ConfigError

_SWITCH = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
_INFINITY = re.compile(r"([+-]?)\.?inf(inity)?", re.IGNORECASE)


class Typed(NamedTuple):
    """The arguments of a command line."""

    flags: list[str]
    """Every flag as --name=value."""
    configs: list[tuple[Path, dict[str, Any]]]
    """The files of --config and their settings, in order."""
    positionals: list[str]
    given: set[str]
    """Names of the settings that flags or files give."""
    by_flags: set[str]
    """Those that flags give."""


def with_underscores(argv: list[str]) -> list[str]:
    """The arguments with underscores in the names of flags."""
    return [
        "--" + item[2:].partition("=")[0].replace("-", "_") + "".join(item[2:].partition("=")[1:])
        if item.startswith("--") and len(item) > 2
        else item
        for item in argv
    ]


def read_typed(parser: Any, argv: list[str]) -> Typed:
    """Sort the arguments into flags, config files and positionals. Raises ConfigError for a flag without its value."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    found: dict[str, list[str]] = {}
    typed = Typed([], [], [], set(), set())
    items = list(argv)
    others = getattr(parser, "other_names", None)  # name elsewhere -> our flag
    while items:
        item = items.pop(0)
        name, equals, value = item.partition("=")
        action = actions.get(name.removesuffix("+"))
        if item == "--":
            typed.positionals.extend(items)
            break
        if not item.startswith("-") or item == "-":
            typed.positionals.append(item)
        elif action is None and others is not None and name.startswith("--") and (row := others(name[2:])):
            if name != "--do_sample":
                items.insert(0, f"--{row}={value if equals else _next(items, name)}")
            elif (_SWITCH.get(value.lower(), value) if equals else _switch(items)) == "false":
                items.insert(0, "--temperature=0")
        elif action is None or action.dest == "help":
            typed.flags.append(item)
            if action is None and items and not items[0].startswith("-"):
                typed.flags.append(items.pop(0))  # the parser names the unknown flag
        elif name == "--config":
            file = value if equals else _next(items, name)
            typed.configs.append((Path(file), _settings(parser, Path(file))))
        elif action.nargs == 0 or action.dest == "print_config":  # without a value, or --print_config=FLAG
            typed.flags.append(item)
            typed.given.add(action.dest)
        else:
            typed.given.add(action.dest)
            found.setdefault(action.option_strings[0], []).append(value if equals else _value_of(action, items, name))
    for name, values in found.items():
        if _appends(actions[name]):
            for _, settings in typed.configs:
                settings.pop(actions[name].dest, None)  # a flag replaces a file's list
        typed.flags.extend(_flags(actions[name], name, values))
    typed.by_flags.update(typed.given)
    typed.given.update(key for _, settings in typed.configs for key in keys_of(settings))
    return typed


def _next(items: list[str], name: str) -> str:
    if not items:
        raise ConfigError(f"{name}: expected a value after it")
    return items.pop(0)


def _value_of(action: Any, items: list[str], name: str) -> str:
    """The value after a flag; switches, and flags whose value may be left out, take only what can be theirs."""
    following = items[0] if items else ""
    if _hint(action) is bool:
        return _switch(items)
    if action.nargs == "?":
        return items.pop(0) if following.isdigit() else str(action.const)
    return _next(items, name)


def _switch(items: list[str]) -> str:
    return _SWITCH[items.pop(0).lower()] if items and items[0].lower() in _SWITCH else "true"


def _hint(action: Any) -> Any:
    return getattr(action, "_typehint", None)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _list_of(hint: Any) -> Any:
    """The type of a list's items; None if the hint has no list."""
    return next((get_args(kind)[0] for kind in _kinds(hint) if get_origin(kind) is list and get_args(kind)), None)


def _flags(action: Any, name: str, values: list[str]) -> list[str]:
    hint = _hint(action)
    inner = _list_of(hint)
    if hint is None or (inner is None and get_origin(hint) is not dict):
        return [f"{name}={_number(hint, value)}" for value in values]
    alone = len(values) == 1
    nested = (
        get_origin(inner) is list and alone and _is_list(values[0]) and not _is_list(values[0].strip()[1:-1] or "[]")
    )
    if alone and not nested and (inner is None or values[0] in ("null", "None") or _is_list(values[0])):
        return [f"{name}={'null' if values[0] == 'None' else values[0]}"]
    if inner is None:
        return [f"{name}={value}" for value in values]
    if alone and len(_kinds(hint)) > 1 and "," not in values[0]:
        return [f"{name}={_number(hint, values[0])}"]
    return [f"{name}=[{', '.join(_items(inner, values))}]"]


def _items(inner: Any, values: list[str]) -> Iterable[str]:
    """The YAML of a list's items, from the values of a flag: one item a value, or several numbers, or a list."""
    for value in values:
        if _is_list(value):
            nested = get_origin(inner) is list and not _is_list(value.strip()[1:-1])
            yield value if nested else value.strip()[1:-1]
        elif inner in (int, float):
            yield value
        elif get_origin(inner) is list:
            yield f"[{value}]"
        else:
            yield quoted(value)


def _is_list(value: str) -> bool:
    return value.strip().startswith("[") and value.strip().endswith("]")


def quoted(text: str) -> str:
    """A YAML string of any text."""
    plain = (c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


def _number(hint: Any, value: str) -> str:
    """A number as YAML reads it: 1e3 and -inf are text to it."""
    kinds = _kinds(hint)
    if not {int, float} & set(kinds):
        return value
    if (infinity := _INFINITY.fullmatch(value)) and float in kinds:
        return f"{infinity[1]}.inf"
    if _EXPONENT.fullmatch(value):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 1e18 else repr(number)
    return value


def _settings(parser: Any, path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file. Raises ConfigError, naming the file, if it holds something else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: holds {type(values).__name__} {str(values)[:40]!r}; expected settings, such as "
            "'temperature: 0.7'"
        )
    translate = getattr(parser, "translate", None)
    return _named(parser, translate(values, path) if translate else values, "")


def _named(parser: Any, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The settings with underscores in their names, and in the form that their types have."""
    dests = {action.dest: action for action in parser._actions}
    named = {}
    for key, value in values.items():
        name = key
        if isinstance(key, str) and prefix + key not in dests and prefix + key.replace("-", "_") in dests:
            name = key.replace("-", "_")
        action = dests.get(f"{prefix}{name}")
        if isinstance(value, dict) and any(dest.startswith(f"{prefix}{name}.") for dest in dests):
            value = _named(parser, value, f"{prefix}{name}.")
        elif action is not None and isinstance(value, str):
            value = _from_text(action, value)
        named[name] = value
    return named


def _appends(action: Any) -> bool:
    return type(action).__name__ == "_AppendAction"


def _from_text(action: Any, value: str) -> Any:
    """A string in a file where the setting is a list of strings, or a number that YAML reads as text."""
    hint = _hint(action)
    if _appends(action) or (_list_of(hint) is str and str not in _kinds(hint)):
        return [value]
    number = _number(hint, value)
    return value if number == value else yaml.safe_load(number)


def keys_of(settings: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """The names of the settings in a file, those of groups and of what is in them."""
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
