"""The fields of `SamplingConfig` for length, end conditions and number of samples."""

# ruff: noqa: RUF009 - `setting` is another way to write dataclasses.field

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt.sampling.settings import rules
from minigpt.sampling.settings.rules import setting


@dataclass(frozen=True)
class Length:
    """Length, end conditions, number of samples."""

    # Length and end.

    max_new_tokens: int = setting(256, rules.COUNT_OR_ZERO, each=True)
    """Maximum number of new tokens; 0 generates none."""
    min_new_tokens: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Forbid end-of-text until this many new tokens are generated; 0 is off."""
    min_length: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """Forbid end-of-text until prompt and new tokens together reach this length; 0 is off."""
    eos_token_id: int | list[int] | None = setting(None, rules.IDS_OR_NONE)
    """Token ids that end a sample; null uses the tokenizer's end-of-text."""
    ignore_eos: bool = setting(False, rules.YES_OR_NO)
    """Continue after an end-of-text token."""
    stop: list[str] = setting([], rules.TEXTS)
    """Strings that end a sample when they appear in the generated text; the prompt is not searched."""
    stop_sequences: list[list[int]] = setting([], rules.ID_LISTS)
    """Sequences of token ids that end a sample; they are kept in the output."""
    include_stop: bool = setting(False, rules.YES_OR_NO)
    """Keep the stop string at the end of the sample instead of cutting it off."""
    max_time: float | None = setting(None, rules.POSITIVE_OR_NONE)
    """Seconds since the start of the call after which every sample ends, finished or not."""
    repetition_stop: int | None = setting(None, rules.TWO_OR_MORE_OR_NONE)
    """End a sample when a sequence of tokens is repeated this many times in a row."""
    repetition_stop_length: int = setting(32, rules.COUNT)
    """Maximum length, in tokens, of the sequence that repetition_stop looks for."""
    overflow: Literal["slide", "stop"] = setting("slide", rules.one_of("slide", "stop"))
    """Beyond the context length: 'slide' drops the oldest tokens, half a context at a time; 'stop' ends the sample."""

    # Special tokens.

    add_special_tokens: bool = setting(True, rules.YES_OR_NO)
    """Put the tokenizer's beginning tokens, such as <s>, in front of a prompt given as text."""
    parse_special: bool = setting(False, rules.YES_OR_NO)
    """Read special tokens in a prompt's text, such as <|endoftext|>, as these tokens; otherwise they are ordinary text.
    """
    skip_special_tokens: bool = setting(True, rules.YES_OR_NO)
    """Leave special tokens out of the generated text."""

    # Samples.

    num_return_sequences: int = setting(1, rules.COUNT)
    """Samples per prompt; with beam search, how many of the best beams are returned."""
    seed: int | list[int] | None = setting(None, rules.SEED, each=True)
    """Random seed, 0 .. 2**64 - 1; the same prompt, seed and settings give the same text. With several prompts, prompt
    i gets seed + i; a list has one seed per prompt. null draws seeds and reports them.
    """
