"""Prepared corpora: a folder of token shards described by a manifest, opened and verified.

    data/NAME/KIND-1a2b3c4d/
        train-00000.bin, ..., val-00000.bin, ...    bare little-endian uint16 or uint32
        minigpt_tokenizer.json
        manifest.json                               what it was made from, counts, sha256 of every shard

The eight digits are a hash over everything that decides the ids: the text, how it is cleaned and split, the tokenizer.
So a folder is never overwritten with other tokens, and the same text gives the same name on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.data.manifest import read_manifest
from minigpt.data.stream import TokenStream
from minigpt.durable import file_sha256, named_path
from minigpt.errors import DataError

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer


class Corpus:
    """A prepared corpus on disk; `open_corpus` and `prepare` make one.

    Attributes:
        folder: where it lies.
        manifest: what manifest.json says.
        hash: of everything that decided its tokens; equal hashes, equal tokens.
        train: the training tokens.
        val: the held-out tokens; empty where data.val_fraction is 0.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.hash: str = manifest["content"]
        self.train, self.val = self._stream("train"), self._stream("val")

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For "train" and "val": tokens, bytes (of the text in UTF-8), characters, documents."""
        names = ("tokens", "bytes", "characters", "documents")
        return {split: {name: found[name] for name in names} for split, found in self.manifest["splits"].items()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, loaded when it is first asked for."""
        from minigpt.tokenizer.build import load_tokenizer

        tokenizer = load_tokenizer(self.folder)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that would read these ids as other text."""
        expected = self.manifest["tokenizer"]
        if tokenizer.hash != expected["hash"]:
            raise DataError(
                f"{self.folder} was prepared with the {expected['kind']} tokenizer {expected['hash'][:12]}, not with "
                f"the {tokenizer.kind} tokenizer {tokenizer.hash[:12]}; prepare the text again with the one you mean"
            )

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's."""
        for shard in self._shards():
            path = self.folder / shard["file"]
            try:
                found = file_sha256(path)
            except OSError as error:
                raise DataError(f"shard {path} cannot be read: {error}") from error
            if found != shard["sha256"]:
                raise DataError(
                    f"shard {path} was altered: its sha256 is {found}, expected {shard['sha256']}; "
                    f"delete {self.folder} and prepare the corpus again"
                )

    def _shards(self) -> Iterator[dict[str, Any]]:
        for split in self.manifest["splits"].values():
            yield from split["shards"]

    def _stream(self, split: str) -> TokenStream:
        shards, width = self.manifest["splits"][split]["shards"], int(self.manifest["dtype"].removeprefix("uint")) // 8
        for shard in shards:
            path, expected = self.folder / shard["file"], shard["tokens"] * width
            if not path.is_file():
                raise DataError(f"shard {path} is missing; delete {self.folder} and prepare the corpus again")
            if (size := path.stat().st_size) != expected:
                raise DataError(
                    f"shard {path} has {size} bytes, expected {expected} ({shard['tokens']} tokens of {width} bytes); "
                    f"delete {self.folder} and prepare the corpus again"
                )
        return TokenStream(
            [self.folder / shard["file"] for shard in shards],
            [shard["tokens"] for shard in shards],
            self.manifest["dtype"],
            self.manifest["vocab_size"],
            split,
        )


def open_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """A corpus that `prepare` made, with the sizes of its files checked.

    Raises:
        DataError: the folder holds no corpus, or its manifest or a shard is missing, cut short or altered.
    """
    folder = named_path(folder, "a prepared corpus")
    return Corpus(folder, read_manifest(folder))
