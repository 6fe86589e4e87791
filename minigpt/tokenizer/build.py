"""Config -> tokenizer; saving and loading a tokenizer.

The file, `minigpt_tokenizer.json`, is complete by itself: `{"format": 1, "hash": ..., "tokenizer": {...}}`, where the
hash is that of the description, so that an altered vocabulary is found out before a model is fed with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minigpt.durable import canonical_json, disk_errors, named_path, sha256_of, write_text
from minigpt.errors import ConfigError, DataError
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.config import KINDS, TokenizerConfig

FILE_NAME = "minigpt_tokenizer.json"
HUGGING_FACE_NAME = "tokenizer.json"
FORMAT = 1


def needs_corpus(config: TokenizerConfig) -> bool:
    """Whether the tokenizer takes its vocabulary from the corpus."""
    return bool(KINDS[config.kind].learns)


def build_tokenizer(
    config: TokenizerConfig, texts: Callable[[], Iterable[str]] | None = None, show: bool = True
) -> Tokenizer:
    """Create the tokenizer for a config.

    Args:
        config: the tokenizer config.
        texts: returns a new iterator over pieces of the corpus; only called if `needs_corpus`.
        show: whether to show progress and notices.

    Raises:
        ConfigError: the corpus is needed and `texts` is None.
        DataError: the corpus is empty, or a vocabulary or tokenizer file is missing or modified.
    """
    if needs_corpus(config) and texts is None:
        raise ConfigError(f"tokenizer.kind '{config.kind}' takes its vocabulary from a corpus, but none was given")
    if config.path is not None:
        return load_tokenizer(config.path)  # of any kind
    return KINDS[config.kind].build(config, texts if needs_corpus(config) else None, show)


def tokenizer_from_dict(description: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from the output of `Tokenizer.to_dict`."""
    kind = description["kind"]
    if kind not in KINDS:
        raise DataError(
            f"tokenizer kind '{kind}' is not one of {', '.join(KINDS)}; use the minigpt version that wrote it, or give "
            f"the --plugins that the run used"
        )
    return KINDS[kind].from_dict(description)


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> Path:
    """Write `minigpt_tokenizer.json` to a folder atomically; create the folder if necessary. Returns the path."""
    path = Path(folder) / FILE_NAME
    record = {"format": FORMAT, "hash": tokenizer.hash, "tokenizer": tokenizer.to_dict()}
    with disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, canonical_json(record))
    return path


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a file, or from a folder: minigpt's file if present, else Hugging Face's tokenizer.json.

    Raises:
        DataError: the file is missing or unreadable, or its hash does not match its content.
    """
    path = named_path(path, "a tokenizer's file or folder")
    if path.is_dir():
        found = [path / name for name in (FILE_NAME, HUGGING_FACE_NAME) if (path / name).is_file()]
        if not found:
            raise DataError(
                f"{path} contains neither {FILE_NAME} nor {HUGGING_FACE_NAME}; give a checkpoint folder, or a folder "
                "with a saved fast Hugging Face tokenizer"
            )
        path = found[0]
    try:
        content = path.read_text(encoding="utf-8")
        record = json.loads(content)
    except FileNotFoundError as error:
        raise DataError(f"tokenizer file {path} does not exist; give a {HUGGING_FACE_NAME} or its folder") from error
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer file {path} cannot be read as JSON ({error}); copy or save it again") from error
    if not isinstance(record, dict):
        raise DataError(
            f"tokenizer file {path} contains a JSON {type(record).__name__}, not a tokenizer; give another file"
        )
    if path.name != FILE_NAME and "format" not in record:
        from minigpt.tokenizer.huggingface import load_hugging_face

        return load_hugging_face(path, content)
    return _from_record(record, path)


def _from_record(record: dict[str, Any], path: Path) -> Tokenizer:
    try:
        version, recorded, description = record["format"], record["hash"], record["tokenizer"]
    except KeyError as missing:
        raise DataError(f"tokenizer file {path} has no field {missing}; copy or save the tokenizer again") from None
    if version != FORMAT:
        raise DataError(
            f"tokenizer file {path} has format {version!r}, expected format {FORMAT}; "
            "use the version that wrote it, or save the tokenizer again"
        )
    if sha256_of(description) != recorded:
        raise DataError(
            f"tokenizer file {path} was modified: its content does not match its hash {recorded}; "
            "copy the original file again"
        )
    return tokenizer_from_dict(description)
