"""Versions of the checkpoint format: which can be read, and how older ones are migrated.

A file of an older format lacks what came later. For each format the tables say which fields came with it, and the value
that says how things were before; a new field is one line in a table, and nothing that was ever saved is lost.
"""

from __future__ import annotations

from typing import Any

from minigpt import __version__
from minigpt.errors import CheckpointError

FORMAT = 2

# Fields of the model that came with a format: what a config.json written before it means.
MODEL_FIELDS: dict[int, dict[str, Any]] = {
    2: {"norm_weight": True, "bigram_rows": 0, "trigram_rows": 0},
}

# Fields of the training config that came with a format: what a train_config.yaml written before it means, as a value or
# as a function of what it holds.
TRAINING_FIELDS: dict[int, dict[str, Any]] = {
    2: {
        "optimizer.name": "adamw",
        "optimizer.ema_decay": 0.0,
        "optimizer.embedding_learning_rate": lambda values: values["optimizer"]["learning_rate"],
        "trainer.precision": "32-true",
        "trainer.compile": False,
        "trainer.activation_checkpointing": False,
        "eval.patience": 0,
    },
}


def check_format(found: Any, where: str, writer: Any = None) -> int:
    """The format of a file. Raises CheckpointError for one that this version cannot read.

    Args:
        found: the number that the file names.
        where: the file.
        writer: the version of minigpt that wrote it, where the file names it.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"{where}: format is {found!r}; a whole number from 1 to {FORMAT} was expected")
    if found > FORMAT:
        needed = f"minigpt-lab {writer}" if isinstance(writer, str) else "a newer minigpt-lab"
        raise CheckpointError(
            f"{where}: has format {found}, minigpt-lab {__version__} reads up to {FORMAT}; install {needed} or later"
        )
    return found


def migrate_model(values: dict[str, Any], written: int) -> dict[str, Any]:
    """A model's config as this version writes it, from one of an older format."""
    for version in range(written + 1, FORMAT + 1):
        values = {**MODEL_FIELDS.get(version, {}), **values}
    return values


def missing_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that a stored training config lacks, "section.field" -> what it meant without them.

    A run stores every field that its version knows, so a field that is absent is one that came later.
    """
    every = {name: value for fields in TRAINING_FIELDS.values() for name, value in fields.items()}
    every |= {f"model.{name}": value for fields in MODEL_FIELDS.values() for name, value in fields.items()}
    found = {}
    for name, value in every.items():
        section, _, field = name.partition(".")
        if isinstance(values.get(section), dict) and field not in values[section]:
            found[name] = value(values) if callable(value) else value
    return found


def migrate_training(values: dict[str, Any]) -> dict[str, Any]:
    """A stored training config as this version writes it, from an older one."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name, value in missing_settings(values).items():
        section, _, field = name.partition(".")
        values[section][field] = value
    return values
