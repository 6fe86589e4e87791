"""Settings of the training text: source, cleaning, validation split, order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from minigpt.choices import Row, Table, under
from minigpt.errors import ConfigError

# Suffix of a file -> its reader; "text" reads the files whose suffix is not in the table.
READERS = Table(
    "reader",
    "data.reader",
    {
        "text": Row("minigpt.data.reading:whole_file", "the whole file is a document"),
        ".jsonl": Row("minigpt.data.reading:json_lines", "a JSON object per line, with a document in data.field"),
    },
)


@dataclass(frozen=True)
class CleanConfig:
    """Cleaning of text before it is tokenized; by default none."""

    normalize: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalisation form; none changes nothing."""
    strip_html: bool = False
    """Remove HTML tags, scripts and styles and keep the text; block elements start a new line."""
    lowercase: bool = False
    """Convert text to lower case."""
    strip_control: bool = False
    """Remove control characters, including carriage returns, but not line feeds and tabs."""
    min_length: int = 0
    """Drop documents with fewer characters than this after cleaning."""
    dedupe: bool = False
    """Drop documents that are identical to an earlier one after cleaning."""


@dataclass(frozen=True)
class DataConfig:
    """Text, its split and its order."""

    source: str = "pydocs"
    """Training text: a name in data/corpora.yaml, a file, a folder, a glob, or - for standard input. Also reads
    .jsonl, .gz and .zst.
    """
    file: str | None = None
    """Local copy of a named corpus, used instead of a download; its sha256 is checked."""
    field: str = "text"
    """Field of each .jsonl object that holds the document."""
    folder: str = "data"
    """Folder of prepared corpora; each is stored in FOLDER/NAME/."""
    val_fraction: float = 0.1
    """Fraction held out for validation, from 0 to below 1: every n-th document, or the last part of the text if there
    are too few documents.
    """
    order: Literal["shuffled", "random"] = "shuffled"
    """shuffled: every window once per epoch, in a new order each epoch. random: windows at random offsets, as in
    nanoGPT.
    """
    clean: CleanConfig = CleanConfig()
    """How text is cleaned before it is tokenized."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # `field` is a setting here
    """Settings of plug-ins, by dotted name: {"reader.csv.column": "text"}, on the command line --data.reader.csv.column
    text.
    """

    def own(self, suffix: str) -> dict[str, Any]:
        """The settings of the reader of a suffix that are its own."""
        return under(f"reader.{suffix.removeprefix('.')}", self.settings)

    def check(self) -> None:
        """Raise ConfigError, naming the field, for invalid values.

        An empty path is an error, because an unset shell variable gives one and pathlib takes it as the current folder.
        """
        for name, expected in (
            ("source", "a corpus name, file, folder, glob pattern, or - for standard input"),
            ("file", "a file, or leave it out"),
            ("folder", "a folder, such as data"),
        ):
            if getattr(self, name) == "":
                raise ConfigError(f"data.{name} is empty; give {expected}")
        for name in self.settings:
            way, _, rest = name.partition(".")
            suffix, _, setting = rest.partition(".")
            if way != "reader" or not setting:
                raise ConfigError(f"data.settings: {name!r} is not of the form reader.SUFFIX.NAME")
            READERS.check(f".{suffix}", f"data.reader.{suffix}")
            READERS.own(f".{suffix}", self.own(suffix), f"data.reader.{suffix}")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction is {self.val_fraction}; expected a fraction from 0 to below 1, such as 0.1"
            )
