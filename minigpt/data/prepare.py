"""Prepare a corpus: survey the text, build the tokenizer, write the shards; or find an earlier result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.data.config import DataConfig
from minigpt.data.corpus import Source, find_source
from minigpt.data.encode import ShardWriter, encode_parts
from minigpt.data.manifest import FORMAT, MANIFEST, appearing_folder, write_manifest
from minigpt.data.shards import Corpus, open_corpus
from minigpt.data.survey import Split, SurveyedText, survey
from minigpt.durable import sha256_of
from minigpt.errors import ConfigError, DataError
from minigpt.terminal import notice, progress, readable
from minigpt.tokenizer.config import KINDS, TokenizerConfig

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer


def find_prepared(data: DataConfig, tokenizer: TokenizerConfig) -> Corpus | None:
    """The corpus that `prepare` would open because it was made before; None where it would have to make it.

    Raises ConfigError or DataError where `data.source` cannot be found.
    """
    source = find_source(data)
    made = _made_for(_request(source, data, tokenizer), Path(data.folder) / source.name)
    return open_corpus(made) if made else None


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, *, show: bool = True, trained_on: str | None = None
) -> Corpus:
    """Make the corpus that a config asks for, or open it where it was made before.

    Args:
        data: which text, cleaned and split how.
        tokenizer: turns it into ids; one that is there already, or how to make one.
        show: whether to show progress and notices; False on ranks other than the first.
        trained_on: hash of the corpus that a run was trained on: where what it was made from cannot be opened any
            more, that corpus is, and a notice says so.

    Raises:
        ConfigError: a field cannot be used as given.
        DataError: the text cannot be read, or nothing is left of it, or an earlier corpus is damaged.
        DiskError: the corpus cannot be written.
    """
    data.check()
    try:
        source = find_source(data)
    except (ConfigError, DataError) as error:
        return _kept(data, trained_on, error, show)
    request = _request(source, data, tokenizer)
    home = Path(data.folder) / source.name
    if made := _made_for(request, home):
        return open_corpus(made)

    try:
        built = _tokenizer_at_hand(tokenizer, show)  # what that lacks is told before a long text is read
        source.settle(show)
        text = survey(source, data.clean, show)
        split = Split(len(text.lengths), data.val_fraction)
    except DataError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return _kept(data, trained_on, error, show)
    if show:
        _announce(text)
    built = built or _learned_tokenizer(tokenizer, text, split, show)
    decided_by = {
        "format": FORMAT,
        "text_sha256": text.sha256,
        "clean": asdict(data.clean),
        "split": {"rule": split.rule, "val_fraction": data.val_fraction},
        "tokenizer": {"kind": built.kind, "hash": built.hash},
    }
    content = sha256_of(decided_by)
    folder = home / f"{built.kind}-{content[:8]}"
    asked = {"request": request, "source": {"name": data.source, "file": data.file, **source.fingerprint}}
    if folder.exists():  # the same text at another time or place: only the manifest has news
        write_manifest(folder, {**open_corpus(folder).manifest, **asked})
        return open_corpus(folder)
    manifest: dict[str, Any] = {
        **decided_by,
        **asked,
        "content": content,
        "vocab_size": built.vocab_size,
        "dtype": "uint16" if built.vocab_size <= 1 << 16 else "uint32",
        "dropped": dict(text.dropped),
        "invalid": text.log.invalid,
    }
    with appearing_folder(folder) as unfinished:
        manifest["splits"] = _write_shards(unfinished, manifest["dtype"], text, split, built, show)
        _save_tokenizer(built, unfinished)
        write_manifest(unfinished, manifest)
    corpus = open_corpus(folder)
    if show:
        notice(
            f"prepared {folder}: {readable(len(corpus.train))} training and {readable(len(corpus.val))} validation "
            f"tokens, vocabulary of {built.vocab_size}"
        )
    return corpus


_told: set[Path] = set()  # of which corpora it was said that they stand in for their text


def _kept(data: DataConfig, content: str | None, error: ConfigError | DataError, show: bool) -> Corpus:
    """The corpus with this hash below data.folder, for a run whose text cannot be opened.

    Raises the error where no hash is given, and DataError where no corpus has it.
    """
    if content is None:
        raise error
    for folder in sorted(Path(data.folder).glob(f"*/*-{content[:8]}")):
        corpus = open_corpus(folder)
        if corpus.hash == content:
            if show and folder not in _told:
                _told.add(folder)
                notice(f"{error}; using what was prepared from it: {folder}")
            return corpus
    raise DataError(
        f"{error}; and what was prepared from it (NAME/KIND-{content[:8]}) is not in {Path(data.folder).absolute()}; "
        "put one of the two back, or to train or evaluate, say where it is now with --data.source or --data.folder"
    ) from error


def _request(source: Source, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> str:
    asked: dict[str, Any] = {
        "format": FORMAT,
        "source": source.fingerprint,
        "field": data.field,
        "clean": asdict(data.clean),
        "val_fraction": data.val_fraction,
        "tokenizer": {"kind": tokenizer.kind},
    }
    if not isinstance(tokenizer, TokenizerConfig):
        asked["tokenizer"]["hash"] = tokenizer.hash
        return sha256_of(asked)
    asked["tokenizer"] |= KINDS[tokenizer.kind].asked(tokenizer)
    return sha256_of(asked)


def _made_for(request: str, home: Path) -> Path | None:
    """The finished folder below `home` whose manifest answers this very request."""
    for path in sorted(home.glob(f"[!.]*/{MANIFEST}")):
        try:
            if json.loads(path.read_text(encoding="utf-8"))["request"] == request:
                return path.parent
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged neighbour is named when it is the one asked for
    return None


def _announce(text: SurveyedText) -> None:
    name, log = text.source.name, text.log
    for line in log.notices():
        notice(f"{name}: {line}")
    if text.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(text.dropped.items()))
        notice(f"{name}: dropped {reasons} of {len(text.kept)} documents")


def _tokenizer_at_hand(tokenizer: TokenizerConfig | Tokenizer, show: bool) -> Tokenizer | None:
    """The tokenizer, where it need not be learned from the text."""
    from minigpt.tokenizer.build import build_tokenizer, needs_corpus

    if not isinstance(tokenizer, TokenizerConfig):
        return tokenizer
    return None if needs_corpus(tokenizer) else build_tokenizer(tokenizer, None, show)


def _learned_tokenizer(config: TokenizerConfig | Tokenizer, text: SurveyedText, split: Split, show: bool) -> Tokenizer:
    """The tokenizer, with a vocabulary from the part of the text that its kind learns from."""
    from minigpt.tokenizer.build import build_tokenizer

    assert isinstance(config, TokenizerConfig)
    learns = KINDS[config.kind].learns

    def texts() -> Iterator[str]:
        for part in text.parts(split):
            if learns == "all" or part.split == learns:
                yield part.text

    return build_tokenizer(config, texts, show)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    from minigpt.tokenizer.build import save_tokenizer

    save_tokenizer(tokenizer, folder)


def _write_shards(
    folder: Path, dtype: str, text: SurveyedText, split: Split, tokenizer: Tokenizer, show: bool
) -> dict[str, Any]:
    writers = {name: ShardWriter(folder, name, dtype) for name in ("train", "val")}
    with progress(f"tokenizing {text.source.name}", sum(text.lengths), "characters", show=show) as bar:
        counts = encode_parts(text.parts(split), tokenizer, writers, bar)
    return {name: {**counts[name], "shards": writer.shards} for name, writer in writers.items()}
