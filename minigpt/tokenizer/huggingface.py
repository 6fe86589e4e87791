"""A Hugging Face `tokenizer.json`, run with the `tokenizers` library; transformers is not needed.

Encoding is the library's, with no special tokens added and none recognised inside text. Decoding is ours wherever the
ids stand for bytes, which they do in the two families that language models use: byte-level BPE, and SentencePiece with
or without byte fallback. For valid UTF-8 both give the library's text; for what is not, the library turns whole runs of
byte tokens into U+FFFD, and could not be streamed. Other decoders (WordPiece, word endings) are run by the library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from minigpt.errors import DataError
from minigpt.tokenizer.alphabet import BYTE_OF
from minigpt.tokenizer.base import END_OF_TEXT, StreamDecoder, TextStreamDecoder, Tokenizer, well_formed
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.folder import SPACE_MARK, Around, Folder

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a `tokenizer.json`.

    Args:
        content: text of the file.
        eot: id of the end-of-text token, which the file does not specify; None for none.
        prefix_ids: ids that precede every text.
    """

    @classmethod
    def asked(cls, config: TokenizerConfig) -> dict[str, Any]:
        """The .json files at and beside config.path, because they decide about ids and end-of-text."""
        if config.path is None:
            return {}
        path = Path(config.path)
        files = sorted((path if path.is_dir() else path.parent).glob("*.json"))
        found = [(str(file), file.stat()) for file in files if file.is_file()]
        return {"files": [(name, status.st_size, status.st_mtime_ns) for name, status in found]}

    def __init__(self, content: str, eot: int | None = None, prefix_ids: Sequence[int] = ()) -> None:
        self.content = content
        self.prefix_ids = tuple(prefix_ids)
        self.kind = "file"
        self.cut = None
        self.eot = eot
        self.verbatim = False
        spec = json.loads(content)
        spec.setdefault("added_tokens", [])
        spec["truncation"] = spec["padding"] = None
        if "dropout" in spec["model"]:
            spec["model"]["dropout"] = None  # makes encoding deterministic
        for token in spec["added_tokens"]:
            token["special"] |= token["id"] == eot  # not marked as special by some chat models
        self._engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._parsing = tokenizers.Tokenizer.from_str(json.dumps(spec))  # recognizes special tokens in a text
        self._engine.encode_special_tokens = True  # encode them as ordinary text
        _hide_specials(self._engine, spec)
        added = self._engine.get_added_tokens_decoder()
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.specials = {token.content: id for id, token in added.items() if token.special}
        texts = [""] * self.vocab_size
        for text, id in vocabulary.items():
            texts[id] = text
        literal = {id: token.content.encode("utf-8") for id, token in added.items()}
        self._set_pieces(texts, literal, spec.get("decoder"))

    def _set_pieces(self, texts: list[str], literal: dict[int, bytes], decoder: dict[str, Any] | None) -> None:
        """Compute the bytes of each id inside a text (`pieces`) and at its start (`_openings`)."""
        steps = _steps(decoder)
        names = [step["type"] for step in steps]
        self.decodes_bytes = True
        if names == ["ByteLevel"]:
            self.pieces = [literal.get(id, _byte_level(text)) for id, text in enumerate(texts)]
            self._openings = self.pieces
        elif names == ["Metaspace"]:
            mark = steps[0]["replacement"]
            scheme = steps[0].get("prepend_scheme") or ("always" if steps[0].get("add_prefix_space", True) else "never")
            self.pieces = [text.replace(mark, " ").encode("utf-8") for text in texts]
            unmarked = [text.replace(mark, "").encode("utf-8") for text in texts]
            self._openings = self.pieces if scheme == "never" else unmarked
        elif _is_sentencepiece(steps):
            fallback = "ByteFallback" in names
            self.pieces = [_sentencepiece(text, fallback) for text in texts]
            self._openings = [piece.removeprefix(b" ") for piece in self.pieces] if "Strip" in names else self.pieces
        else:
            self.decodes_bytes = False
            self.pieces = [self._run_decoder([id]).encode("utf-8") for id in range(self.vocab_size)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._engine.encode_batch_fast([well_formed(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_special(self, text: str) -> list[int]:
        """Encode one text to ids; special tokens inside it become their ids, as in transformers."""
        return list(self._parsing.encode(well_formed(text), add_special_tokens=False).ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids to bytes, special tokens to their text. Raises DataError for an id outside the vocabulary."""
        if self.decodes_bytes:
            return super().decode_bytes(ids)
        return self._run_decoder(self._checked(ids)).encode("utf-8")

    def stream_decoder(self) -> StreamDecoder:
        """Create a decoder for ids that arrive one at a time."""
        return super().stream_decoder() if self.decodes_bytes else TextStreamDecoder(self)

    def _opening(self, id: int) -> bytes:
        return self._openings[id]

    def _run_decoder(self, ids: list[int]) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        description = {"kind": self.kind, "tokenizer_json": self.content, "eot": self.eot}
        # Omitted if empty; older files do not have the key.
        return {**description, "prefix_ids": list(self.prefix_ids)} if self.prefix_ids else description

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> HuggingFaceTokenizer:
        """Rebuild a tokenizer from the output of `to_dict`."""
        return cls(description["tokenizer_json"], description["eot"], description.get("prefix_ids", ()))


def from_engine(engine: Any, eot: int | None = None) -> HuggingFaceTokenizer:
    """Create the tokenizer of a `tokenizers.Tokenizer` object, such as the backend of one of transformers'."""
    content = engine.to_str()
    spec = json.loads(content)
    vocabulary = _vocabulary(spec)
    if eot is None:
        eot = next((vocabulary[text] for text in (END_OF_TEXT, "</s>") if text in vocabulary), None)
    return HuggingFaceTokenizer(content, eot, Around(spec.get("post_processor")).before)


def load_hugging_face(path: Path, content: str) -> HuggingFaceTokenizer:
    """Create the tokenizer of a `tokenizer.json` from its text and the files next to it; see `Folder`.

    Raises:
        DataError: the library cannot read it, or a file next to it is not JSON.
    """
    try:
        spec, beside = json.loads(content), Folder(path.parent)
        beside.apply(spec)
        if spec != json.loads(content):
            content = json.dumps(spec, ensure_ascii=False)
        vocabulary, around = _vocabulary(spec), Around(spec.get("post_processor"))
        beside.name_unheard(spec, vocabulary, around)
        return HuggingFaceTokenizer(content, beside.end_of_text(vocabulary), around.before)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"tokenizer file {path} cannot be read by tokenizers {tokenizers.__version__} ({error!r}); save it again "
            f"with a current version of transformers"
        ) from None


def _vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """Text -> id of the model's tokens (a list in Unigram models) and of the added tokens."""
    tokens = spec["model"]["vocab"]
    if isinstance(tokens, list):
        tokens = {text: id for id, (text, _) in enumerate(tokens)}
    return {**tokens, **{token["content"]: token["id"] for token in spec.get("added_tokens", [])}}


def _hide_specials(engine: tokenizers.Tokenizer, spec: dict[str, Any]) -> None:
    """Split the text of special tokens, so that the model itself (as Unigram does) cannot encode it as one token."""
    model = spec["model"]
    exposed = {token["content"] for token in spec["added_tokens"] if token["special"] and len(token["content"]) > 1}
    exposed &= engine.get_vocab(with_added_tokens=False).keys()
    if "merges" in model and not model.get("ignore_merges"):
        exposed &= {"".join(merge).replace(" ", "") for merge in model["merges"]}
    if exposed:
        pattern = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in sorted(exposed))
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        before = [engine.pre_tokenizer] if engine.pre_tokenizer else []
        engine.pre_tokenizer = pre_tokenizers.Sequence([*before, split])


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not decoder:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
    """Whether the decoder is a converted SentencePiece one: marks to spaces, byte tokens to bytes, strip one space."""
    names = [step["type"] for step in steps if step["type"] != "ByteFallback"]
    if names not in (["Replace", "Fuse"], ["Replace", "Fuse", "Strip"]) or steps[0]["type"] != "Replace":
        return False
    if steps[0]["pattern"] != {"String": SPACE_MARK} or steps[0]["content"] != " ":
        return False
    strip = steps[-1]
    return strip["type"] != "Strip" or (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)


def _byte_level(text: str) -> bytes:
    """Bytes of a byte-level token; like the library, the token's UTF-8 if it has other characters."""
    try:
        return bytes(BYTE_OF[character] for character in text)
    except KeyError:
        return text.encode("utf-8")


def _sentencepiece(text: str, fallback: bool) -> bytes:
    if fallback and (byte := _BYTE_TOKEN.fullmatch(text)):
        return bytes.fromhex(byte[1])
    return text.replace(SPACE_MARK, " ").encode("utf-8")
