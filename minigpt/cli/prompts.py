"""The prompts of a command line: flags, arguments, files, or text that is piped in."""

from __future__ import annotations

import os
import select
import stat
import sys
from typing import Any

from minigpt.errors import ConfigError
from minigpt.terminal import notice

PATIENCE = 1.0  # seconds to wait for text in a pipe that nobody asked to read


def read_prompts(values: Any, typed: list[str]) -> list[Any]:
    """Texts or lists of token ids, at least one.

    Args:
        values: parsed flags.
        typed: prompts that stand without a flag.
    """
    from minigpt.data.reading import read_text
    from minigpt.tokenizer.base import well_formed

    if typed:
        if values.prompt is not None:
            raise ConfigError(f"--prompt and {typed[0]!r}: give prompts in one of the two ways")
        values.prompt = typed
    given = [
        name for name in ("prompt", "prompt_ids", "prompt_file", "prompt_lines") if getattr(values, name) is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in given)}: give one of them")
    if values.prompt_ids is not None:
        if not values.prompt_ids or not all(values.prompt_ids):
            raise ConfigError(
                "--prompt_ids: holds no token id; give ids such as 1,2,3 for each prompt, or leave it out"
            )
        return values.prompt_ids
    if values.prompt_file is not None:
        return [read_text("--prompt_file", values.prompt_file)]
    if values.prompt_lines is not None:
        text = read_text("--prompt_lines", values.prompt_lines)
        lines = text.removesuffix("\n").split("\n")  # not at other characters that some call line breaks
        if not text:
            raise ConfigError(f"--prompt_lines {values.prompt_lines}: holds no line; give one prompt a line")
        return [line.removesuffix("\r") for line in lines]
    if values.prompt is None:
        piped = _piped()
        return ["" if piped is None else piped]
    if "-" in values.prompt:
        if len(values.prompt) > 1:
            raise ConfigError("--prompt -: standard input is one prompt; for several give --prompt_lines -")
        return [_without_last_newline(read_text("--prompt", "-"))]
    return [well_formed(prompt) for prompt in values.prompt]


def _piped() -> str | None:
    """The text in a pipe or file that is standard input; None without such, or if none comes."""
    from minigpt.data.reading import read_text

    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        return None
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        if os.name == "posix" and not select.select([sys.stdin], [], [], PATIENCE)[0]:
            notice("standard input is a pipe without text so far, and is ignored; --prompt - waits for it")
            return None
    elif not stat.S_ISREG(kind):
        return None
    text = read_text("standard input", "-")
    return _without_last_newline(text) if text else None


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
