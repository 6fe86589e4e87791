"""The plug-ins of tests/plugins/, loaded for a block of code and then forgotten."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt import plugins
from minigpt.plugins import TABLES, load_plugins, table

FOLDER = Path(__file__).parents[1] / "plugins"
FILES = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("test_"))


def flags(*names: str) -> list[str]:
    """--plugins for these files of tests/plugins/; for all of them without names."""
    files = [FOLDER / f"{name}.py" for name in names] or FILES
    return [word for path in files for word in ("--plugins", str(path))]


@contextmanager
def forgetting() -> Iterator[None]:
    """Context manager: plug-ins that are loaded inside are gone afterwards."""
    before = {kind: dict(table(kind).rows) for kind in TABLES}
    known, files = dict(plugins._loaded), dict(plugins._files)
    try:
        yield
    finally:
        for kind, rows in before.items():
            table(kind).rows = rows
        for name in set(plugins._loaded.values()) - set(known.values()):
            sys.modules.pop(name, None)
        plugins._loaded.clear()
        plugins._loaded.update(known)
        plugins._files.clear()
        plugins._files.update(files)


@contextmanager
def plugged(*names: str) -> Iterator[None]:
    """Context manager: these files of tests/plugins/ are loaded, or all of them without names."""
    with forgetting():
        load_plugins(flags(*names)[1::2])
        yield
