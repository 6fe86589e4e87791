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
    """Tensors and arrays as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_id(value: Any) -> bool:
    """Whether the value is a whole number of any kind."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_list(prompts: Any, what: str = "prompt") -> list[Any]:
    """One text or list of ids, or several, as a list of them. Raises ConfigError for something that is neither."""
    prompts = plain(prompts)
    if not isinstance(prompts, (str, Sequence)) or isinstance(prompts, (bytes, bytearray)):
        raise ConfigError(f"the {what} is {str(prompts)[:80]}; expected a text, a list of token ids, or a list of such")
    if isinstance(prompts, str) or (len(prompts) and is_id(prompts[0])):
        prompts = [prompts]
    return [plain(prompt) for prompt in prompts]


def encode_all(tokenizer: Tokenizer, prompts: Any, what: str = "prompt", bare: bool = False) -> list[list[int]]:
    """The ids of one text or list of ids, or of several: a text's as a model reads it from its beginning.

    Args:
        tokenizer: encodes the texts; token ids are taken as they are.
        prompts: see above.
        what: what they are, in messages.
        bare: without what the tokenizer puts in front of a text.

    Raises:
        ConfigError: something that is neither.
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
    """The prompts' ids, at least one each. An empty prompt starts from what the tokenizer puts in front of a text, else
    from its end-of-text, else from a newline.

    Raises:
        ConfigError: something that is no prompt, a token that the model or the tokenizer has not.
    """
    encoded = [ids or start_ids(tokenizer) for ids in encode_all(tokenizer, prompts)]
    check_prompts(encoded, min(vocab_size, tokenizer.vocab_size))
    return encoded


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """What an empty prompt starts from."""
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
    """What turns the tokens after a prompt into text that continues the prompt's."""
    decoder = tokenizer.stream_decoder()
    tail = _tail(tokenizer, prompt)
    # Some vocabularies drop a space at the start of a text, which a continuation is not: the decoder has to have seen
    # a token. Half a character at the prompt's end stays with the prompt, so then it has not.
    if not tokenizer.decode(tail).endswith("\ufffd"):
        for token in tail:
            decoder.push(token)
    return TextReader(decoder, stop, include_stop)


def _tail(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, as many as a character may be spread over, of the text that it ends in."""
    tail = list(prompt[-8:])  # more bytes than a character has
    starts = {tokenizer.eot, *tokenizer.prefix_ids}
    while any(token in starts for token in tail):
        tail.pop(0)
    return tail


def read_all(reader: TextReader, tokens: Sequence[int], end_ids: Sequence[int]) -> str:
    """The text of written tokens, as a stream of them would have told it."""
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
    """Whether one of the stop strings stands in the last of the written tokens."""
    if not stop:
        return False
    # Each token but those for parts of characters and special ones brings a byte at least.
    reach = max(len(text.encode()) for text in stop) + 8
    # What begins a text may lose its space, so a beginning is read behind the prompt's end; see `text_reader`.
    before = _tail(tokenizer, prompt) if len(written) <= reach else []
    start = tokenizer.decode(before)
    if start.endswith("\ufffd"):
        before, start = [], ""
    text = tokenizer.decode([*before, *written[-reach:]])[len(start) :]
    return any(one in text for one in stop)
