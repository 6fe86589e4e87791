"""Settings of the tokenizer. Light imports only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from minigpt.choices import Row, Table, under
from minigpt.errors import ConfigError

SMALLEST_BPE = 257  # the 256 bytes and <|endoftext|>
PUBLISHED = "minigpt.tokenizer.published:Published"
# Facts: vocab_size if it is fixed, or what `minigpt plan` assumes ("assumed"); whether a token is about a byte.
KINDS = Table(
    "tokenizer",
    "tokenizer.kind",
    {
        "byte": Row("minigpt.tokenizer.plain:ByteTokenizer", "257 ids", {"vocab_size": 257, "per_byte": True}),
        "char": Row(
            "minigpt.tokenizer.plain:CharTokenizer",
            "the characters of the corpus",
            {"vocab_size": 128, "assumed": "characters", "per_byte": True},
        ),
        "bpe": Row(
            "minigpt.tokenizer.bpe:BPETokenizer", "byte-pair encoding trained on the corpus", {"smallest": SMALLEST_BPE}
        ),
        "gpt2": Row(PUBLISHED, "published by OpenAI for GPT-2", {"vocab_size": 50257}),
        "cl100k": Row(PUBLISHED, "for GPT-4", {"vocab_size": 100277}),
        "o200k": Row(PUBLISHED, "for GPT-4o", {"vocab_size": 200019}),
        "file": Row("minigpt.tokenizer.huggingface:HuggingFaceTokenizer", "a saved one", {"from_path": True}),
    },
)
UNKNOWN = ("error", "drop")


@dataclass(frozen=True)
class TokenizerConfig:
    """Selects the tokenizer.

    Args:
        kind: kind of the tokenizer.
        vocab_size: size of the trained vocabulary, including <|endoftext|>; at least 257. Only for kind bpe.
        path: a tokenizer.json, or a folder that contains a tokenizer of minigpt or Hugging Face. Only for kind file.
        unknown: handling of characters that are not in the corpus: error or drop. Only for kind char.
        settings: settings of plug-ins: {"kind.NAME": value}, on the command line --tokenizer.kind.NAME VALUE.
    """

    kind: str = "byte"
    vocab_size: int = 4096
    path: str | None = None
    unknown: str = "error"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        KINDS.own(self.kind, self.own())
        _one_of("unknown", self.unknown, UNKNOWN)
        if self.vocab_size < KINDS.fact(self.kind, "smallest", self.vocab_size):
            raise ConfigError(
                f"tokenizer.vocab_size is {self.vocab_size}; expected at least {SMALLEST_BPE} (the 256 bytes and "
                f"<|endoftext|>)"
            )
        from_path = KINDS.fact(self.kind, "from_path", False)
        if from_path and not self.path:
            raise ConfigError(
                "tokenizer.kind is 'file' but tokenizer.path is empty; give a tokenizer.json or its folder"
            )
        if not from_path and self.path is not None:
            raise ConfigError(
                f"tokenizer.path is '{self.path}' but tokenizer.kind is '{self.kind}'; only kind 'file' uses a path: "
                "set tokenizer.kind to file or omit the path"
            )

    def own(self) -> dict[str, Any]:
        """The settings of the kind that are its own."""
        return under("kind", self.settings)


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"tokenizer.{field} is '{value}'; expected one of {', '.join(allowed)}{hint}")
