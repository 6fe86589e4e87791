"""Prompts -> token ids, and generated tokens -> text that continues the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from minigpt.errors import ConfigError, MinigptError
from minigpt.sampling.loop.loop import check_prompts
from minigpt.sampling.loop.stopping import TextReader

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer

Prompt = str | Sequence[int]


def plain(value: Any) -> Any:
    """Convert tensors and arrays to Python numbers and lists; return anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_id(value: Any) -> bool:
    """Whether the value is an integer of any type (True and False are not)."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_list(prompts: Any, what: str = "prompt") -> list[Any]:
    """Wrap one text or list of ids, or several, in a list. Raises ConfigError for any other type."""
    prompts = plain(prompts)
    if not isinstance(prompts, (str, Sequence)) or isinstance(prompts, (bytes, bytearray)):
        raise ConfigError(f"the {what} is {str(prompts)[:80]}; expected a text, a list of token ids, or a list of them")
    if isinstance(prompts, str) or (len(prompts) and is_id(prompts[0])):
        prompts = [prompts]
    return [plain(prompt) for prompt in prompts]


def encode_all(tokenizer: Tokenizer, prompts: Any, what: str = "prompt", bare: bool = False) -> list[list[int]]:
    """Encode one prompt or several; a text gets the tokenizer's prefix ids.

    Args:
        tokenizer: encodes the texts; token ids are used unchanged.
        prompts: a text, a list of token ids, or a list of these.
        what: their name in error messages.
        bare: do not add the tokenizer's prefix ids to a text.

    Raises:
        ConfigError: a prompt is neither a text nor a list of token ids.
    """
    encoded = []
    for number, prompt in enumerate(as_list(prompts, what)):
        if isinstance(prompt, str):
            encoded.append(list(tokenizer.encode(prompt) if bare else tokenizer.prompt_ids(prompt)))
        elif isinstance(prompt, (list, tuple)) and all(map(is_id, prompt)):
            encoded.append([int(token) for token in prompt])
        else:
            raise ConfigError(f"{what} {number} is {str(prompt)[:80]}; expected a text or a list of token ids")
    return encoded


def encode_prompts(tokenizer: Tokenizer, prompts: Any, vocab_size: int) -> list[list[int]]:
    """Encode prompts to at least one id each. An empty prompt becomes the tokenizer's prefix ids, else its end-of-text
    token, else a newline.

    Raises:
        ConfigError: an invalid prompt, or a token outside the model's or the tokenizer's vocabulary.
    """
    encoded = [ids or start_ids(tokenizer) for ids in encode_all(tokenizer, prompts)]
    check_prompts(encoded, min(vocab_size, tokenizer.vocab_size))
    return encoded


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for an empty prompt: the prefix ids, else end-of-text, else a newline."""
    if tokenizer.prefix_ids or tokenizer.eot is not None:
        return list(tokenizer.prefix_ids) or [tokenizer.eot]  # type: ignore[list-item]
    try:
        newline = list(tokenizer.encode("\n"))
    except MinigptError:
        newline = []
    if not newline:
        raise ConfigError(
            "the prompt is empty, and the tokenizer has neither an end-of-text token nor a newline to start from; "
            "give a prompt of at least one character"
        )
    return newline


def text_reader(tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], include_stop: bool) -> TextReader:
    """A reader that turns the tokens after a prompt into text that continues the prompt."""
    decoder = tokenizer.stream_decoder()
    tail = _tail(tokenizer, prompt)
    # Some tokenizers drop a leading space at the start of a text. A continuation is not a start, so the decoder first
    # reads the end of the prompt. If the prompt ends in an incomplete character, it does not: those bytes belong to
    # the prompt's text.
    if not tokenizer.decode(tail).endswith("\ufffd"):
        for token in tail:
            decoder.push(token)
    return TextReader(decoder, stop, include_stop)


def _tail(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt: as many as one character may span, without special tokens at the start of a text."""
    tail = list(prompt[-8:])  # a character has fewer bytes
    starts = {tokenizer.eot, *tokenizer.prefix_ids}
    while any(token in starts for token in tail):
        tail.pop(0)
    return tail


def read_all(reader: TextReader, tokens: Sequence[int], end_ids: Sequence[int]) -> str:
    """The text of all generated tokens, identical to the streamed text."""
    text = ""
    for token in tokens:
        if token in end_ids:
            break
        piece, stopped = reader.push(token)
        text += piece
        if stopped:
            break
    return text + reader.flush()[0]


def holds_stop(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the last generated tokens contain one of the stop strings."""
    if not stop:
        return False
    # Every token adds at least one byte, except special tokens and parts of characters.
    reach = max(len(text.encode()) for text in stop) + 8
    # The start of a text may lose its leading space, so decode it after the end of the prompt; see `text_reader`.
    before = _tail(tokenizer, prompt) if len(written) <= reach else []
    start = tokenizer.decode(before)
    if start.endswith("\ufffd"):
        before, start = [], ""
    text = tokenizer.decode([*before, *written[-reach:]])[len(start) :]
    return any(one in text for one in stop)
