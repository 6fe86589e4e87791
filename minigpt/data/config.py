"""What a corpus is made of and how it is prepared, as declared on the command line and in YAML files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt.errors import ConfigError


@dataclass(frozen=True)
class CleanConfig:
    """What happens to text before it is tokenized; by default nothing at all."""

    normalize: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalisation form; none keeps the characters as they are."""
    strip_html: bool = False
    """Keep the text of HTML and drop its tags, scripts and styles; block elements begin a new line."""
    lowercase: bool = False
    """Turn every letter into its lower-case form."""
    strip_control: bool = False
    """Drop control characters, carriage returns among them; line feeds and tabs stay."""
    min_length: int = 0
    """Drop documents shorter than this many characters after cleaning."""
    dedupe: bool = False
    """Keep only the first of documents that are equal to the last character after cleaning."""


@dataclass(frozen=True)
class DataConfig:
    """Which text a model is trained on and how it becomes training and validation tokens."""

    source: str = "pydocs"
    """A name in data/corpora.yaml, a file, a folder, a glob, or - for standard input; .jsonl, .gz and .zst are read."""
    file: str | None = None
    """A local copy of a named corpus, used instead of a download and checked by the same sha256."""
    field: str = "text"
    """.jsonl only: the field of each line's object that holds the document."""
    folder: str = "data"
    """Where prepared corpora are kept: in FOLDER/NAME/."""
    val_fraction: float = 0.1
    """Share held out for validation, from 0 to below 1: every tenth document, or the last tenth of the characters where
    documents are too few for that."""
    order: Literal["shuffled", "random"] = "shuffled"
    """shuffled: every window once an epoch, in a new order each time; random: windows drawn anywhere, as in nanoGPT."""
    clean: CleanConfig = CleanConfig()
    """What happens to text before it is tokenized."""

    def check(self) -> None:
        """Raise ConfigError, naming the field, for what no corpus can be made with.

        An empty path is what a shell makes of a variable that is not set; to pathlib it is the current folder.
        """
        for name, expected in (
            ("source", "a name, a file, a folder, a pattern, or - for standard input"),
            ("file", "a file, or leave it out"),
            ("folder", "a folder, such as data"),
        ):
            if getattr(self, name) == "":
                raise ConfigError(f"data.{name} is empty; give {expected}")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction is {self.val_fraction}; expected a share from 0 to below 1, such as 0.1"
            )
