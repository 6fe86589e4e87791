"""The characters that byte-level BPE writes bytes with, and where a document can be cut."""

from __future__ import annotations

import re

# A document can be cut between a line end and a letter: every pattern here ends a split there, and none looks back
# beyond the start of the split or ahead by more than one character. After other whitespace a cut is not safe, because
# the split of whitespace depends on what follows it.
LINE_START = re.compile(r"(?<=\S\n)(?=[^\W\d_])")


def _byte_characters() -> dict[str, int]:
    """Character -> byte map of GPT-2 and Hugging Face, whose files represent bytes as printable characters.

    Printable Latin-1 characters represent themselves; other bytes are U+0100, U+0101, ... in order. A space is 'Ġ'.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
