"""Text <-> token ids for a study, tokenized as for sampling, with every token displayable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.model.gpt import GPT
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.given import as_tokenizer

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


def refuse_other_than_ids(ids: Tensor) -> None:
    """Raise DataError, naming the dtype, for a tensor that is not of an integer type."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise DataError(f"token ids: have dtype {ids.dtype}; expected an integer type, such as torch.int64")


def need_two(length: int) -> None:
    """Raise DataError for texts of one token, for which no loss is defined."""
    if length < 2:
        raise DataError(
            "text: the loss needs at least two tokens, because the first one is not predicted; give a longer text "
            "(and a model with block_size of at least 2)"
        )


class Texts:
    """A model and an optional tokenizer. Without a tokenizer, texts must be token ids."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None) -> None:
        self.model, self._tokenizer = model, None if tokenizer is None else as_tokenizer(tokenizer)
        self.config = model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError if the study has none."""
        if self._tokenizer is None:
            raise ConfigError("this study has no tokenizer: give token ids, or Study.of(model, tokenizer)")
        return self._tokenizer

    def ids(self, text: Text) -> Tensor:
        """Return token ids (B, T) on the model's device, with the tokenizer's beginning-of-text tokens for strings.

        Raises DataError for texts that are empty, have unequal numbers of tokens, or are outside the model's
        vocabulary, and ConfigError for more than block_size tokens.
        """
        if isinstance(text, str):
            text = [text]
        if not isinstance(text, Tensor) and len(text) and isinstance(text[0], str):
            rows = [self.tokenizer.prompt_ids(item) for item in text]  # type: ignore[arg-type]
            if len({len(row) for row in rows}) > 1:
                raise DataError(
                    f"texts of {', '.join(str(len(row)) for row in rows)} tokens: expected equal numbers of tokens; "
                    "give one text at a time, or choose texts of the same length"
                )
            text = rows
        try:
            ids = torch.as_tensor(text, device=self.model.device)
        except (ValueError, TypeError) as error:
            raise DataError(f"text: expected text, or token ids in rows of equal length ({error})") from None
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or not ids.numel():
            raise DataError(f"text: has no tokens (shape {tuple(ids.shape)}); give at least one")
        refuse_other_than_ids(ids)
        if int(ids.min()) < 0 or int(ids.max()) >= self.model.vocab_size:
            raise DataError(
                f"token ids {int(ids.min())} .. {int(ids.max())}: expected 0 .. {self.model.vocab_size - 1}"
            )
        if ids.shape[1] > self.config.block_size:
            raise ConfigError(
                f"text: {ids.shape[1]} tokens do not fit the model's block_size of {self.config.block_size}; give fewer"
            )
        return ids.long()

    def tokens(self, text: Text) -> list[str]:
        """Return the text of each token; without a tokenizer, its id. Invalid UTF-8 becomes �.

        Raises DataError for several texts.
        """
        rows = self.ids(text).tolist()
        if len(rows) != 1:
            raise DataError(f"text: {len(rows)} texts; give one text at a time")
        [row] = rows
        if self._tokenizer is None:
            return [str(id) for id in row]
        return [self.token(id) for id in row]

    def token(self, id: int) -> str:
        """Return the text of one token; <id> if the tokenizer has no such id."""
        if self._tokenizer is None or id >= self._tokenizer.vocab_size:
            return f"<{id}>"
        return self._tokenizer.pieces[id].decode("utf-8", "replace")

    def token_id(self, text: str | int) -> int:
        """Return the id of a text that is exactly one token. Raises DataError for no or several tokens."""
        if isinstance(text, int):
            return int(self.ids([text])[0, 0])
        ids = self.tokenizer.encode(text)
        if len(ids) != 1:
            pieces = " | ".join(self.token(id) for id in ids)
            raise DataError(f"{text!r}: is {len(ids)} tokens ({pieces}); expected exactly one")
        return ids[0]
