"""Documents that a script passes: stored once, named after their hash, so that the run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.config import DataConfig
from minigpt.data.encode import ShardWriter
from minigpt.data.manifest import FORMAT, appearing_folder, write_manifest
from minigpt.data.shards import Corpus, open_corpus
from minigpt.data.survey import Split
from minigpt.durable import canonical_json, disk_errors, sha256_of
from minigpt.errors import DataError
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.build import save_tokenizer


def documents_file(documents: Iterable[str] | Iterable[Sequence[int]], data: DataConfig) -> tuple[Path, bool]:
    """Write documents to FOLDER/documents/HASH.jsonl, one per line, unless it is there; they are read once, in order.

    Returns:
        The file, and whether the documents are texts (otherwise they are token ids).

    Raises:
        DataError: there is no document, or one is neither a text nor a list of token ids, or both kinds are mixed.
        DiskError: the file cannot be written.
    """
    if isinstance(documents, (str, bytes)):
        raise DataError("documents: is one text; give a list of texts, such as [text]")
    folder = Path(data.folder) / "documents"
    spool = folder / f".{secrets.token_hex(4)}.part"
    digest, kinds = hashlib.sha256(), set()
    with disk_errors(str(folder), "free some space or use another data.folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with spool.open("w", encoding="utf-8") as file:
                for number, document in enumerate(documents):
                    is_text = isinstance(document, str)
                    kinds.add(is_text)
                    if len(kinds) > 1:
                        kind = "a text" if is_text else "a list of token ids"
                        raise DataError(f"documents: {number} is {kind}, the ones before are not; give one kind")
                    line = canonical_json({"text": document} if is_text else {"ids": _ids(document, number)}) + "\n"
                    digest.update(line.encode())
                    file.write(line)
            if not kinds:
                raise DataError("documents: there are none; give at least one text")
            path = folder / f"{digest.hexdigest()[:16]}.jsonl"
            os.replace(spool, path)
        finally:
            spool.unlink(missing_ok=True)
    return path, kinds == {True}


def _ids(document: Any, number: int) -> list[int]:
    try:
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)) or (ids.size and ids.min() < 0):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"documents: {number} is {type(document).__name__}; expected a text or a flat list of token ids"
        ) from None
    return [int(id) for id in ids]


def prepare_ids(source: Path, data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """A corpus from documents of token ids, split into training and validation as texts are.

    The end-of-text token follows every whole document, unless the document ends with it already.

    Args:
        source: what `documents_file` wrote.
        data: for val_fraction and folder.
        tokenizer: the tokenizer of the ids.

    Raises DataError for an id outside the tokenizer's vocabulary.
    """
    with source.open(encoding="utf-8") as file:
        split = Split(sum(1 for line in file if json.loads(line)["ids"]), data.val_fraction)
    decided_by = {
        "format": FORMAT,
        "text_sha256": source.stem,
        "split": {"rule": split.rule, "val_fraction": data.val_fraction},
        "tokenizer": {"kind": tokenizer.kind, "hash": tokenizer.hash},
    }
    content = sha256_of(decided_by)
    folder = Path(data.folder) / "documents" / f"ids-{content[:8]}"
    if folder.exists():
        return open_corpus(folder)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    lengths = np.array([len(piece) for piece in tokenizer.token_bytes()])
    with appearing_folder(folder) as unfinished:
        writers = {name: ShardWriter(unfinished, name, dtype) for name in ("train", "val")}
        counts = {name: {"tokens": 0, "bytes": 0, "characters": 0, "documents": 0} for name in writers}
        kept = 0
        with source.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                ids = np.array(json.loads(line)["ids"], dtype=np.int64)
                if not len(ids):
                    continue
                if ids.max() >= tokenizer.vocab_size:
                    raise DataError(
                        f"documents: {number} has token id {ids.max()}; the tokenizer has {tokenizer.vocab_size} ids"
                    )
                border = split.train_length(kept, len(ids))
                end = [] if tokenizer.eot in (None, ids[-1]) or border not in (0, len(ids)) else [tokenizer.eot]
                kept += 1
                for name, part in (("train", ids[:border]), ("val", ids[border:])):
                    if len(part):
                        written = np.array([*part, *end], dtype=np.uint32)
                        writers[name].write(written)
                        counts[name]["tokens"] += len(written)
                        counts[name]["bytes"] += int(lengths[part].sum())
                        counts[name]["documents"] += 1
        for writer in writers.values():
            writer.close()
        save_tokenizer(tokenizer, unfinished)
        write_manifest(
            unfinished,
            {
                **decided_by,
                "content": content,
                "request": content,
                "source": {"name": str(source)},
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype,
                "dropped": {},
                "invalid": 0,
                "splits": {name: {**counts[name], "shards": writer.shards} for name, writer in writers.items()},
            },
        )
    return open_corpus(folder)
