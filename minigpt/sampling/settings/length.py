"""The fields of `SamplingConfig` that say how long texts get, what ends them, and how many there are."""

# ruff: noqa: RUF009 - `setting` is another way to write dataclasses.field

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt.sampling.settings import rules
from minigpt.sampling.settings.rules import setting


@dataclass(frozen=True)
class Length:
    """Lengths, ends and numbers of samples."""

    # Length and end.

    max_new_tokens: int = setting(256, rules.COUNT_OR_ZERO, each=True)
    """Most tokens to write after the prompt; 0 writes none."""
    min_new_tokens: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """No end-of-text before this many tokens were written."""
    min_length: int | None = setting(None, rules.COUNT_OR_ZERO, off=0)
    """No end-of-text before prompt and output together have this many tokens."""
    eos_token_id: int | list[int] | None = setting(None, rules.IDS_OR_NONE)
    """Token ids that end a sample; null takes the tokenizer's end-of-text."""
    ignore_eos: bool = setting(False, rules.YES_OR_NO)
    """Write on after an end-of-text token."""
    stop: list[str] = setting([], rules.TEXTS)
    """Texts that end a sample where one of them appears in what was written; the prompt does not count."""
    stop_sequences: list[list[int]] = setting([], rules.ID_LISTS)
    """The same for sequences of token ids; they stay in the sample."""
    include_stop: bool = setting(False, rules.YES_OR_NO)
    """Keep the stop text at the end of the sample rather than cut it off."""
    max_time: float | None = setting(None, rules.POSITIVE_OR_NONE)
    """Seconds, from the call on, after which every sample ends, complete or not."""
    repetition_stop: int | None = setting(None, rules.TWO_OR_MORE_OR_NONE)
    """End a sample once a piece of it came this many times in a row."""
    repetition_stop_length: int = setting(32, rules.COUNT)
    """Tokens of the longest piece that repetition_stop looks for."""
    overflow: Literal["slide", "stop"] = setting("slide", rules.one_of("slide", "stop"))
    """Past the model's context length: 'slide' goes on with the latest tokens in view, 'stop' ends the sample."""

    # Samples.

    num_return_sequences: int = setting(1, rules.COUNT)
    """Samples written for each prompt; with beams, how many of the best are returned."""
    seed: int | None = setting(None, rules.SEED, each=True)
    """0 .. 2**64 - 1: the same prompt, seed and settings give the same text; null draws a seed and reports it."""
