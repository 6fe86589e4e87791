"""Prompts -> token ids, and generated tokens -> text that continues the prompt."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minigpt.errors import ConfigError, MinigptError
from minigpt.sampling.loop.loop import check_prompts
from minigpt.sampling.loop.stopping import NOTHING, TextReader

if TYPE_CHECKING:
    from minigpt.sampling.settings.config import SamplingConfig
    from minigpt.tokenizer.base import Tokenizer

Prompt = str | Iterable[int]


def plain(value: Any) -> Any:
    """Convert tensors and arrays to Python numbers and lists; return anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_list(prompts: Any, what: str = "prompt") -> list[Any]:
    """One prompt or several as a list of texts and lists of ids. Raises ConfigError for anything else.

    Ids may be integers of any kind in any iterable, such as an array, a tensor, a range or a generator. `[]` is no
    prompt; an array or tensor without elements is one prompt without ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    empty = hasattr(prompts, "tolist") and getattr(prompts, "ndim", 0) == 1 and len(prompts) == 0
    prompts = plain(prompts)
    if isinstance(prompts, (bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
        raise ConfigError(f"the {what} is {str(prompts)[:80]}; expected a text, a list of token ids, or a list of them")
    several = list(prompts)
    if empty or (several and _as_id(several[0]) is not None):
        several = [several]
    return [prompt if isinstance(prompt, str) else _ids(prompt, what, n) for n, prompt in enumerate(several)]


def _as_id(value: Any) -> int | None:
    """An integer of any type, tensors of no dimension included, as an int; None for anything else, also a bool."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool") or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _ids(prompt: Any, what: str, number: int) -> list[int]:
    prompt = plain(prompt)
    iterable = isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray, Mapping))
    given = list(prompt) if iterable else []
    ids = [_as_id(token) for token in given]
    if not iterable or any(token is None for token in ids):
        shown = str(given if iterable else prompt)[:80]
        raise ConfigError(f"{what} {number} is {shown}; expected a text or a list of token ids")
    return ids  # type: ignore[return-value]


def encode_all(tokenizer: Tokenizer, prompts: Any, what: str = "prompt", bare: bool = False) -> list[list[int]]:
    """Encode one text or several; a text gets the tokenizer's prefix ids.

    Args:
        tokenizer: encodes the texts; token ids are used unchanged.
        prompts: a text, a list of token ids, or a list of these.
        what: their name in error messages.
        bare: do not add the tokenizer's prefix ids to a text.

    Raises:
        ConfigError: a prompt is neither a text nor a list of token ids.
    """
    return [
        list(tokenizer.prompt_ids(prompt, add_special_tokens=not bare)) if isinstance(prompt, str) else prompt
        for prompt in as_list(prompts, what)
    ]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Any], configs: Sequence[SamplingConfig], vocab_size: int, first: int = 0
) -> list[list[int]]:
    """Encode prompts to at least one id each. An empty prompt becomes the tokenizer's prefix ids, else its end-of-text
    token, else a newline.

    Args:
        tokenizer: encodes the texts.
        prompts: from `as_list`.
        configs: the settings of each prompt.
        vocab_size: of the model.
        first: number of the first prompt, for error messages.

    Raises:
        ConfigError: a token outside the model's or the tokenizer's vocabulary.
    """
    encoded = []
    for prompt, config in zip(prompts, configs, strict=True):
        if isinstance(prompt, str):
            prompt = list(tokenizer.prompt_ids(prompt, config.add_special_tokens, config.parse_special))
        encoded.append(prompt or start_ids(tokenizer))
    check_prompts(encoded, min(vocab_size, tokenizer.vocab_size), numbers=range(first, first + len(encoded)))
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


def hidden_tokens(tokenizer: Tokenizer, skip_special_tokens: bool) -> dict[int, str]:
    """The special tokens that are left out of the text, with their texts."""
    return {id: text for text, id in tokenizer.specials.items()} if skip_special_tokens else {}


def text_reader(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    stop: Sequence[str],
    include_stop: bool,
    hidden: Mapping[int, str] = NOTHING,
) -> TextReader:
    """A reader that turns the tokens after a prompt into text that continues the prompt; see `hidden_tokens`."""
    decoder = tokenizer.stream_decoder()
    tail = _tail(tokenizer, prompt)
    # Some tokenizers drop a leading space at the start of a text. A continuation is not a start, so the decoder first
    # reads the end of the prompt. If the prompt ends in an incomplete character, it does not: those bytes belong to
    # the prompt's text.
    if not tokenizer.decode(tail).endswith("\ufffd"):
        for token in tail:
            decoder.push(token)
    return TextReader(decoder, stop, include_stop, hidden)


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


def holds_stop(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    written: Sequence[int],
    stop: Sequence[str],
    hidden: Mapping[int, str] = NOTHING,
) -> bool:
    """Whether the last generated tokens contain one of the stop strings."""
    if not stop:
        return False
    if any(text in hidden.get(written[-1], "") for text in stop):
        return True
    written = [token for token in written if token not in hidden] if hidden else written
    # Every token adds at least one byte, except special tokens and parts of characters.
    reach = max(len(text.encode()) for text in stop) + 8
    # The start of a text may lose its leading space, so decode it after the end of the prompt; see `text_reader`.
    before = _tail(tokenizer, prompt) if len(written) <= reach else []
    start = tokenizer.decode(before)
    if start.endswith("\ufffd"):
        before, start = [], ""
    text = tokenizer.decode([*before, *written[-reach:]])[len(start) :]
    return any(one in text for one in stop)
