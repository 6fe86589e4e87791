"""The files beside a tokenizer.json, and which one wins where they disagree, as in transformers 5.

tokenizer.json is run as it stands. Its template alone decides what is put around a text; tokenizer_config.json, or
special_tokens_map.json where the former lists no added tokens, which token ends one. docs/interop.md lists every key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.errors import DataError
from minigpt.terminal import notice_once
from minigpt.tokenizer.base import END_OF_TEXT

CONFIG = "tokenizer_config.json"
SPACE_MARK = "▁"  # U+2581, SentencePiece's space
# Keys of tokenizer_config.json that do not affect ids: padding and truncation of batches, slow tokenizers, chat.
# Special tokens are checked against the vocabulary.
HARMLESS = frozenset(
    {
        *("tokenizer_class", "processor_class", "model_max_length", "max_length", "backend", "is_local"),
        *("local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file"),
        *("padding_side", "truncation_side", "pad_to_multiple_of", "pad_token_type_id", "stride"),
        *("truncation_strategy", "clean_up_tokenization_spaces", "chat_template", "model_input_names", "errors"),
        *("legacy", "use_default_system_prompt", "sp_model_kwargs", "spaces_between_special_tokens", "use_fast"),
        *("do_lower_case", "split_special_tokens", "add_prefix_space", "add_bos_token", "add_eos_token"),
        *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
        *("init_inputs", "from_slow", "model_specific_special_tokens"),
    }
)


class Folder:
    """The small files in the folder of a tokenizer.json. Raises DataError for a file that is not JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._read(CONFIG)
        self.model = self._read("config.json")
        self.generation = self._read("generation_config.json")
        # As in transformers: the older file of special tokens is used if the newer one lists no added tokens.
        older = {} if "added_tokens_decoder" in self.config else self._read("special_tokens_map.json")
        self.named = {**self.config, **older}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as JSON ({error}); copy it again, or remove it") from None
        return fields if isinstance(fields, dict) else {}

    def end_of_text(self, vocabulary: Mapping[str, int]) -> int | None:
        """Id of the end-of-text token; None if there is none."""
        text = _content(self.named.get("eos_token"))
        if text in vocabulary:
            return vocabulary[text]
        for fields in (self.generation, self.model):
            id = fields.get("eos_token_id")
            first = id[0] if isinstance(id, list) and id else id
            if isinstance(first, int) and first in vocabulary.values():
                return first
        return next((vocabulary[text] for text in (END_OF_TEXT, "</s>") if text in vocabulary), None)

    def apply(self, spec: dict[str, Any]) -> None:
        """Apply add_prefix_space, the only key of tokenizer_config.json that overrides tokenizer.json.

        It only takes effect for the two tokenizer classes of transformers that use it.
        """
        kind = str(self.config.get("tokenizer_class") or self.model.get("tokenizer_class") or "").removesuffix("Fast")
        if kind == "GPT2Tokenizer" or (not kind and self.model.get("model_type") == "gpt2"):
            for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
                if step["type"] == "ByteLevel":
                    step["add_prefix_space"] = bool(self.config.get("add_prefix_space", False))
        elif kind == "LlamaTokenizer" and self.config.get("add_prefix_space") is False:
            for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
                if step["type"] == "Metaspace":
                    step["prepend_scheme"] = "never"
            _remove(spec, "normalizer", "normalizers", {"type": "Prepend", "prepend": SPACE_MARK})
            _remove(spec, "decoder", "decoders", {"type": "Strip", "content": " ", "start": 1, "stop": 0})

    def name_unheard(self, spec: Mapping[str, Any], vocabulary: Mapping[str, int], around: Around) -> None:
        """Print one notice about all settings in these files that have no effect in minigpt."""
        unheard = [key for key, value in self.config.items() if value not in (None, False) and not self._is_known(key)]
        for flag, ids in (("add_bos_token", around.before), ("add_eos_token", around.after)):
            if flag in self.config and bool(self.config[flag]) != bool(ids):
                unheard.append(f"{flag} {str(self.config[flag]).lower()} (tokenizer.json's template decides)")
        if around.after:
            unheard.append(f"the template's tokens {around.after} after a text (they would end the text)")
        missing = {text: key for text, key in self._tokens() if text not in vocabulary}
        unheard += [f"{key} {text} (not in tokenizer.json)" for text, key in missing.items()]
        if others := self._redefined(spec):
            unheard.append(f"added_tokens_decoder, which differs from tokenizer.json for {', '.join(others)}")
        if spec["model"].get("dropout"):
            unheard.append(f"dropout {spec['model']['dropout']} (encoding is deterministic)")
        if unheard:
            notice_once(f"{self.path}: minigpt's tokenizer ignores {'; '.join(unheard)} (see docs/interop.md)")

    def _is_known(self, key: str) -> bool:
        return key in HARMLESS or key.endswith("_token")

    def _tokens(self) -> list[tuple[str, str]]:
        """Texts of all tokens in the files, each with its key."""
        found = []
        for key, value in self.named.items():
            if key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
                several = value.values() if isinstance(value, dict) else value or ()
            else:
                several = [value] if key.endswith("_token") else []
            found += [(text, key) for token in several if isinstance(text := _content(token), str) and text]
        return found

    def _redefined(self, spec: Mapping[str, Any]) -> list[str]:
        """Tokens whose id or flags in tokenizer_config.json differ from tokenizer.json."""
        known = {token["content"]: token for token in spec.get("added_tokens", [])}
        others = []
        for id, token in (self.config.get("added_tokens_decoder") or {}).items():
            there = known.get(_content(token) or "")
            if there and any(there.get(key, value) != value for key, value in {**token, "id": int(id)}.items()):
                others.append(there["content"])
        return others


class Around:
    """Ids that the post_processor of a tokenizer.json adds before and after a text."""

    def __init__(self, processor: Mapping[str, Any] | None) -> None:
        self.before: list[int] = []
        self.after: list[int] = []
        for step in _steps(processor, "processors"):
            if step["type"] == "TemplateProcessing":
                sides: tuple[list[int], list[int]] = ([], [])
                after = 0
                for piece in step["single"]:
                    if "Sequence" in piece:
                        after = 1
                    else:
                        sides[after].extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
            elif step["type"] in ("RobertaProcessing", "BertProcessing"):
                sides = ([step["cls"][1]], [step["sep"][1]])
            else:  # ByteLevel only affects offsets
                continue
            self.before, self.after = sides[0] + self.before, self.after + sides[1]


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Any]:
    if not part:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _remove(spec: dict[str, Any], part: str, inner: str, step: dict[str, Any]) -> None:
    if not spec.get(part):
        return
    kept = [other for other in _steps(spec[part], inner) if other != step]
    spec[part] = {"type": "Sequence", inner: kept} if kept else None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
