"""Configuration of the corpus: its text, cleaning and split, as set on the command line and in YAML files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt.errors import ConfigError


@dataclass(frozen=True)
class CleanConfig:
    """Cleaning of the text before tokenization; off by default."""

    normalize: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalization form; none leaves the text unchanged."""
    strip_html: bool = False
    """Remove HTML tags, scripts and styles and keep the text; block elements start a new line."""
    lowercase: bool = False
    """Convert the text to lower case."""
    strip_control: bool = False
    """Remove control characters, including carriage returns; line feeds and tabs are kept."""
    min_length: int = 0
    """Drop documents with fewer characters than this after cleaning."""
    dedupe: bool = False
    """Drop exact duplicates of earlier documents, compared after cleaning."""


@dataclass(frozen=True)
class DataConfig:
    """The text that a model is trained on, and how it is split into training and validation tokens."""

    source: str = "pydocs"
    """Text to train on: a name in data/corpora.yaml, a file, folder or glob pattern, or - for standard input. Formats:
    plain text and .jsonl, also as .gz or .zst."""
    file: str | None = None
    """Local copy of a named corpus, used instead of downloading it; its sha256 is checked."""
    field: str = "text"
    """Field of each .jsonl object that holds the document."""
    folder: str = "data"
    """Folder for prepared corpora, saved as FOLDER/NAME/."""
    val_fraction: float = 0.1
    """Fraction of the text for validation, 0 to below 1: whole documents, evenly spaced; if there are too few, the end
    of each document."""
    order: Literal["shuffled", "random"] = "shuffled"
    """Order of the training windows. shuffled: each window once per epoch, reshuffled every epoch; random: windows at
    random positions, with replacement (as in nanoGPT)."""
    clean: CleanConfig = CleanConfig()
    """Cleaning of the text before tokenization."""

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
