"""Settings of the tokenizer. Light imports only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from minigpt.errors import ConfigError

KINDS = ("byte", "char", "bpe", "gpt2", "cl100k", "o200k", "file")
UNKNOWN = ("error", "drop")
SMALLEST_BPE = 257  # the 256 bytes and <|endoftext|>


@dataclass(frozen=True)
class TokenizerConfig:
    """Selects the tokenizer.

    Args:
        kind: byte (257 ids, no training), char (the characters of the corpus), bpe (byte-pair encoding trained on the
            corpus), gpt2, cl100k, o200k (published by OpenAI for GPT-2, GPT-4 and GPT-4o), or file (a saved one).
        vocab_size: size of the trained vocabulary, including <|endoftext|>; at least 257. Only for kind bpe.
        path: a tokenizer.json, or a folder that contains a tokenizer of minigpt or Hugging Face. Only for kind file.
        unknown: handling of characters that are not in the corpus: error or drop. Only for kind char.
    """

    kind: str = "byte"
    vocab_size: int = 4096
    path: str | None = None
    unknown: str = "error"

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("unknown", self.unknown, UNKNOWN)
        if self.kind == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise ConfigError(
                f"tokenizer.vocab_size is {self.vocab_size}; expected at least {SMALLEST_BPE} (the 256 bytes and "
                f"<|endoftext|>)"
            )
        if self.kind == "file" and not self.path:
            raise ConfigError(
                "tokenizer.kind is 'file' but tokenizer.path is empty; give a tokenizer.json or its folder"
            )
        if self.kind != "file" and self.path is not None:
            raise ConfigError(
                f"tokenizer.path is '{self.path}' but tokenizer.kind is '{self.kind}'; only kind 'file' uses a path: "
                "set tokenizer.kind to file or omit the path"
            )


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"tokenizer.{field} is '{value}'; expected one of {', '.join(allowed)}{hint}")
