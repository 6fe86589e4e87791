"""Tables of choices: name -> thing, with a line of help. A config field that names a thing has one of these tables.

    NORMS = Table("norm", "model.norm", {"rmsnorm": Row("minigpt.model.norms:RMSNorm", "divides by the RMS")})
    NORMS["rmsnorm"]          the class; imported on first use, so that a table costs nothing

Plug-ins add rows with `minigpt.register` (see plugins.py). Code outside the table's file never compares names: what it
must know about a thing is an attribute of the thing, or a fact of its row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from minigpt.errors import ConfigError


class UnknownChoice(ConfigError):
    """A name that is not in its table. `plugins`: modules that may define it, as a run stores them."""

    def __init__(self, message: str, plugins: tuple[str, ...] = ()) -> None:
        self.message, self.plugins = message, plugins
        hint = ""
        if len(plugins) == 1:
            hint = f"; the run used a plug-in: give --plugins {plugins[0]}, which runs its code"
        elif plugins:
            hint = f"; the run used plug-ins: give --plugins for each, which runs its code: {', '.join(plugins)}"
        super().__init__(message + hint)


class Setting(NamedTuple):
    """A keyword argument of a thing: a setting of its own."""

    name: str
    default: Any
    type: type | None
    """bool, int, float or str; None accepts any value."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    target: Any
    """The thing, or "module:attribute"."""
    help: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What can be asked without importing the thing."""
    module: str | None = None
    """The module that registered it; None for what the package brings."""


class Table(Mapping[str, Any]):
    """The things that a field can name.

    Args:
        kind: the kind, as in `minigpt.register`.
        where: the config field, for messages.
        rows: what the package brings.
    """

    def __init__(self, kind: str, where: str, rows: Mapping[str, Row]) -> None:
        self.kind, self.where = kind, where
        self.rows = dict(rows)

    def __getitem__(self, name: str) -> Any:
        """Return the thing. Raises UnknownChoice for a name that is not in the table."""
        self.check(name)
        target = self.rows[name].target
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def get(self, name: str, default: Any = None) -> Any:
        """The thing, or a default for a name that is not in the table."""
        return self[name] if name in self.rows else default

    def add(self, name: str, thing: Any, help: str, module: str, facts: Mapping[str, Any]) -> None:
        """Add a row. Raises ConfigError if the name is taken by something else; a module may be loaded again."""
        taken = self.rows.get(name)
        if taken is not None and taken.module != module:
            by = f"the plug-in {taken.module}" if taken.module else "minigpt"
            raise ConfigError(f"register: {self.kind} '{name}' exists already (from {by}); choose another name")
        self.rows[name] = Row(thing, help, facts, module)

    def check(self, name: Any, where: str | None = None) -> None:
        """Raise UnknownChoice, with the closest names, unless the table has this name."""
        if isinstance(name, str) and name in self.rows:
            return
        near = get_close_matches(str(name), self.rows, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        known = f"is not one of {', '.join(self.rows)}" if self.rows else f"is unknown: no {self.kind} is registered"
        raise UnknownChoice(f"{where or self.where}: '{name}' {known}{hint}")

    def fact(self, name: str, fact: str, default: Any = None) -> Any:
        """What is known about a thing: a fact of its row, else an attribute of the thing itself."""
        self.check(name)
        row = self.rows[name]
        if fact in row.facts or isinstance(row.target, str):
            return row.facts.get(fact, default)
        return getattr(row.target, fact, default)

    def described(self) -> str:
        """The names with their lines of help, for `--help`."""
        return "; ".join(f"{name} ({row.help})" if row.help else name for name, row in self.rows.items())

    def settings(self, name: str) -> dict[str, Setting]:
        """The settings that a thing has of its own: keyword arguments with defaults. Only plug-ins have any."""
        self.check(name)
        row = self.rows[name]
        if row.module is None:
            return {}
        found = {}
        for parameter in inspect.signature(row.target).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
                kind = type(parameter.default)
                known = kind if kind in (bool, int, float, str) else None
                found[parameter.name] = Setting(parameter.name, parameter.default, known)
        return found

    def own(self, name: str, given: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
        """Check values for a thing's own settings. Raises ConfigError for an unknown setting or a wrong type."""
        where = where or self.where
        known, checked = self.settings(name), {}
        for key, value in given.items():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                some = f"expected one of {', '.join(known)}" if known else f"{self.kind} '{name}' has no settings"
                hint = f"did you mean {near[0]}?" if near else some
                raise ConfigError(f"{where}.{key}: no such setting; {hint}")
            checked[key] = _typed(f"{where}.{key}", value, known[key].type)
        return checked

    def bound(self, name: str, given: Mapping[str, Any], where: str | None = None) -> Any:
        """The thing with its own settings filled in; the thing itself if none are given."""
        own = self.own(name, given, where)
        return partial(self[name], **own) if own else self[name]


def _typed(where: str, value: Any, kind: type | None) -> Any:
    if kind is None or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ConfigError(f"{where}: {value!r} is not {names[kind]}")


def under(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings by dotted name the ones under a prefix: ("norm", {"norm.alpha": 1}) -> {"alpha": 1}."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}
