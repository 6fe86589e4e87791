"""Plug-ins: Python modules that register things by name, loaded only when a person names them.

    # my_parts.py
    @minigpt.register("activation", "leaky_relu2", help="squared leaky ReLU")
    def leaky_relu2(pre, *, slope: float = 0.1): ...

    minigpt train --plugins my_parts --model.activation leaky_relu2 --model.activation.slope 0.2

Nothing that is read from a run, a checkpoint or a model folder loads a plug-in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from minigpt.choices import Table, UnknownChoice
from minigpt.errors import ConfigError

Thing = TypeVar("Thing")

# kind -> where its table is. The module is imported when something of this kind is registered.
TABLES = {
    "norm": "minigpt.model.config:NORMS",
    "position": "minigpt.model.config:POSITIONS",
    "activation": "minigpt.model.config:ACTIVATIONS",
    "optimizer": "minigpt.training.config:OPTIMIZERS",
    "schedule": "minigpt.training.config:SCHEDULES",
    "loss": "minigpt.training.config:LOSSES",
    "logger": "minigpt.training.config:LOGGERS",
    "reader": "minigpt.data.config:READERS",
    "tokenizer": "minigpt.tokenizer.config:KINDS",
    "processor": "minigpt.sampling.settings.shape:OWN",
    "analysis": "minigpt.internals.access.access:ANALYSES",
    "verb": "minigpt.cli.main:VERBS",
}

_loaded: dict[str, str] = {}  # plug-in as it was named -> its module
_files: dict[Path, str] = {}


def table(kind: str) -> Table:
    """The table of a kind. Raises ConfigError for an unknown kind."""
    if kind not in TABLES:
        raise ConfigError(f"register: kind {kind!r} is not one of {', '.join(TABLES)}")
    module, _, name = TABLES[kind].partition(":")
    return getattr(import_module(module), name)


def register(kind: str, name: str, help: str = "", **facts: Any) -> Callable[[Thing], Thing]:
    """Decorator: register a function or class under a name, so that configs and flags can use it.

    Args:
        kind: what it is; docs/extending.md has the signature of every kind.
        name: its name in configs.
        help: one line, shown by `--help`.
        facts: what can be asked about it, such as off=0 for a processor.

    Raises:
        ConfigError: an unknown kind, or the name is taken.
    """
    rows = table(kind)
    if not isinstance(name, str) or not name or set(name) & set(" \t\n=,:/"):
        raise ConfigError(f"register: {name!r} is not a valid name for a {kind}; expected a word such as my_{kind}")

    def add(thing: Thing) -> Thing:
        rows.add(name, thing, " ".join(help.split()), getattr(thing, "__module__", "__main__"), facts)
        return thing

    return add


def load_plugins(names: Iterable[str]) -> None:
    """Import plug-ins: modules by name, or files by path. What is loaded already is not loaded again.

    Raises ConfigError if one cannot be imported.
    """
    for name in names:
        if name in _loaded:
            continue
        if not isinstance(name, str) or not name:
            raise ConfigError(f"plugins: {name!r} is not a module or a .py file")
        try:
            _loaded[name] = _from_file(Path(name)) if name.endswith(".py") else _from_path(name)
        except ConfigError:
            raise
        except Exception as error:  # a plug-in can raise anything
            raise ConfigError(f"plugins: {name} cannot be imported ({type(error).__name__}: {error})") from error


def _from_path(name: str) -> str:
    """Import a module by name; the current folder is searched too, as for `python -m`."""
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        import_module(name)
    finally:
        if added:
            sys.path.remove(here)
    return name


def _from_file(path: Path) -> str:
    path = path.expanduser().resolve()
    if path in _files:
        return _files[path]
    if not path.is_file():
        raise ConfigError(f"plugins: there is no file {path}; give a .py file or the name of a module")
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        raise ConfigError(f"plugins: {path} has the name of another module ({name}); rename the file")
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files[path] = name
    return name


def loaded() -> tuple[str, ...]:
    """The plug-ins that were loaded, as they were named; other processes load the same."""
    return tuple(_loaded)


def modules_needed() -> tuple[str, ...]:
    """What another process must import to have the same tables: plug-ins, and modules that registered by themselves."""
    known = {module.partition(".")[0] for module in _loaded.values()}
    others = {
        row.module
        for kind, place in TABLES.items()
        if place.partition(":")[0] in sys.modules
        for row in table(kind).rows.values()
        if row.module not in (None, "__main__") and row.module.partition(".")[0] not in known
    }
    return (*_loaded, *sorted(others))


@contextmanager
def naming(plugins: Any) -> Iterator[None]:
    """Context manager: an error about an unknown name also names those plug-ins of a run that are not loaded."""
    try:
        yield
    except UnknownChoice as error:
        named = plugins if isinstance(plugins, list) else []
        raise UnknownChoice(error.message, tuple(str(name) for name in named if name not in _loaded)) from None
