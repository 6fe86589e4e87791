"""Plug-ins on the command line: --plugins, and flags for the settings that registered things have of their own.

--plugins my_parts                loads my_parts, or a .py file; `plugins:` in a YAML file named by --config does too
--model.norm.alpha 0.3            becomes --model.settings '{"norm.alpha": 0.3}'
--losses.z_loss 1e-4              becomes --losses '{"z_loss": 1e-4}'
--top_gap 5                       becomes --extra '{"top_gap": 5}', for a registered processor
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from minigpt.choices import Table
from minigpt.errors import ConfigError
from minigpt.plugins import load_plugins, table

# A flag's prefix -> the dict field that holds the settings, and the prefix of their names there.
PREFIXES = {
    "model.norm.": ("model.settings", "norm.", "norm"),
    "model.position.": ("model.settings", "position.", "position"),
    "model.activation.": ("model.settings", "activation.", "activation"),
    "optimizer.name.": ("optimizer.settings", "name.", "optimizer"),
    "optimizer.schedule.": ("optimizer.settings", "schedule.", "schedule"),
    "tokenizer.kind.": ("tokenizer.settings", "kind.", "tokenizer"),
    "data.reader.": ("data.settings", "reader.", "reader"),
    "losses.": ("losses", "", "loss"),
}


def take_plugins(argv: list[str]) -> list[str]:
    """Load the plug-ins that the arguments and their config files name; return the arguments without --plugins."""
    rest, named, takes = [], [], False
    for item in argv:
        flag, equals, value = item.partition("=")
        if takes:
            named.append(item)
            takes = False
        elif flag == "--plugins":
            named += [value] if equals else []
            takes = not equals
        else:
            rest.append(item)
    if takes:
        raise ConfigError("--plugins: expected a module or a .py file after it")
    for values in _config_files(rest):
        listed = values.get("plugins") or []
        named += [listed] if isinstance(listed, str) else listed
    load_plugins(named)
    return rest


def _config_files(argv: list[str]) -> Iterator[dict[str, Any]]:
    """The contents of the YAML files that --config names; one that cannot be read is reported by the parser."""
    for flag, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        if name == "--config":
            path = Path(value if equals else following)
            with suppress(OSError, ValueError, yaml.YAMLError):
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
                if isinstance(values, dict):
                    yield values


def own_settings(parser: Any, argv: list[str]) -> list[str]:
    """Turn flags for settings of registered things into the dict fields that hold them, over those of config files."""
    known = {action.dest for action in parser._actions}
    found: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    items = iter(argv)
    for item in items:
        flag, equals, value = item.removeprefix("--").partition("=")
        place = _place(flag, known) if item.startswith("--") else None
        if place is None:
            rest.append(item)
            continue
        if not equals:
            value = next(items, "")
            if not value:
                raise ConfigError(f"--{flag}: expected a value after it")
        found.setdefault(place[0], {})[place[1]] = _plain(flag, value)
    for field, values in found.items():
        before: dict[str, Any] = dict(parser.get_default(field) or {})
        for file in _config_files(rest):
            inside: Any = file
            for key in field.split("."):
                inside = inside.get(key) if isinstance(inside, dict) else None
            before |= inside if isinstance(inside, dict) else {}
        rest += [f"--{field}", json.dumps({**before, **values})]
    return rest


def _place(flag: str, known: set[str]) -> tuple[str, str] | None:
    for prefix, (field, inside, _) in PREFIXES.items():
        if flag.startswith(prefix) and len(flag) > len(prefix) and field in known:
            return field, inside + flag.removeprefix(prefix)
    name = flag.partition(".")[0]
    if "extra" in known and flag not in known and name in table("processor"):
        return "extra", flag
    return None


def _plain(flag: str, value: str) -> Any:
    """A value as YAML reads it; the text itself if something has a setting of this name that is text."""
    kind = next((kind for prefix, (*_, kind) in PREFIXES.items() if flag.startswith(prefix)), "processor")
    rows, setting = table(kind), flag.rpartition(".")[2]
    if any(each.type is str for name in rows for each in rows.settings(name).values() if each.name == setting):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def described(parser: Any) -> str:
    """Help for the flags of registered things, such as --model.norm.alpha FLOAT (default 0.5)."""
    known = {action.dest for action in parser._actions}
    lines = []
    for prefix, (field, _, kind) in PREFIXES.items():
        if field in known:
            lines += _flags(prefix.removesuffix("."), table(kind), named=kind in ("loss", "reader"))
    if "extra" in known:
        lines += _flags("", table("processor"), named=True)
    return "\n".join(["flags of plug-ins:", *lines]) if lines else ""


def _flags(prefix: str, rows: Table, named: bool) -> list[str]:
    lines = []
    for name, row in rows.rows.items():
        if row.module is None:
            continue
        flag = ".".join(filter(None, (prefix, name.removeprefix(".")))) if named else prefix
        if named:
            lines.append(f"  --{flag} VALUE   {row.help} ({row.module})")
        for setting in rows.settings(name).values():
            kind = setting.type.__name__ if setting.type else "value"
            lines.append(f"  --{flag}.{setting.name} {kind.upper()}   {rows.kind} {name}; default {setting.default!r}")
    return lines
