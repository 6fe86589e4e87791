"""Settings of the training text: source, cleaning, validation split, order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt.errors import ConfigError


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
    """Text to train on, its split and its order."""

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
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction is {self.val_fraction}; expected a fraction from 0 to below 1, such as 0.1"
            )
