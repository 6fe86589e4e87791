"""Large texts for a study: a run's own corpus or another, in windows, and activations gathered over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.names import Names, select
from minigpt.internals.access.text import Text, refuse_other_than_ids

if TYPE_CHECKING:
    from minigpt.internals.access.access import Access


class Tokens(Protocol):
    """A long sequence of token ids with random access to windows, such as a `minigpt.data.stream.TokenStream`."""

    def __len__(self) -> int: ...

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read the windows [start, start + length) as int64 (n, length)."""


class InMemory:
    """Token ids in memory, as `Tokens`."""

    def __init__(self, ids: Sequence[int] | np.ndarray) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.ids[np.asarray(starts)[:, None] + np.arange(length)]


def tokens_of(study: Access, text: str | Sequence[int] | Tensor | Tokens | None = None, split: str = "val") -> Tokens:
    """Return the tokens to study a model on.

    Args:
        study: the study; its tokenizer encodes the text.
        text: a text or token ids of any length; None: the training corpus of the study's run.
        split: split of that corpus, "val" or "train".

    Raises:
        ConfigError: no text is given, and the model was not trained with minigpt.
        DataError: the run's corpus has changed, or the text is shorter than two tokens.
    """
    if text is None:
        if study.run is None or not study.run.config:
            raise ConfigError("text: the model was not trained with minigpt and has no corpus; give a text")
        from minigpt.evaluation.text import corpus_of

        corpus = corpus_of(study.run)
        tokens: Tokens = corpus.train if split == "train" else corpus.val
    elif isinstance(text, str):
        tokens = InMemory(study.tokenizer.prompt_ids(text))
    elif isinstance(text, Sequence | Tensor):
        ids = torch.as_tensor(text)
        if ids.numel():
            refuse_other_than_ids(ids)
        tokens = InMemory(np.asarray(ids.cpu()).reshape(-1))
    else:
        tokens = text
    if isinstance(tokens, InMemory) and len(tokens):
        study.ids([[int(tokens.ids.min())], [int(tokens.ids.max())]])  # raises an error for ids outside the vocabulary
    if len(tokens) < 2:
        raise DataError(f"text: has {len(tokens)} tokens; expected at least 2; give a longer text")
    return tokens


def windows(tokens: Tokens, width: int, rows: int = 32, limit: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield all tokens once, in order, as batches of consecutive windows: (start of the first row, ids (B, T)).

    Args:
        tokens: see `tokens_of`.
        width: T. If the last window is shorter, it is a batch of its own.
        rows: maximum B.
        limit: stop after this many tokens.
    """
    total = len(tokens) if limit is None else min(limit, len(tokens))
    whole = total // width
    for first in range(0, whole, rows):
        starts = np.arange(first, min(first + rows, whole)) * width
        yield int(starts[0]), torch.from_numpy(tokens.read(starts, width))
    if left := total - whole * width:
        yield whole * width, torch.from_numpy(tokens.read(np.array([whole * width]), left))


def draws(tokens: Tokens, width: int, rows: int, seed: int) -> Iterator[Tensor]:
    """Yield endless batches of windows at random positions: ids (rows, T), determined by the seed."""
    width = min(width, len(tokens))
    generator = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(tokens.read(generator.integers(len(tokens) - width + 1, size=rows), width))


def site_of(study: Access, name: Names, axes: tuple[str, ...] = ("batch", "pos")) -> str:
    """Return the full name of a single activation.

    Raises ConfigError if the name matches several, or if its axes do not start with `axes`.
    """
    found = select(study.config, name)
    if len(found) != 1:
        raise ConfigError(f"activation {name!r}: matches {len(found)} activations; name one, as in ('resid_post', 0)")
    if study.table[found[0]].axes[: len(axes)] != axes:
        raise ConfigError(
            f"activation {found[0]}: its axes are {', '.join(study.table[found[0]].axes)}; "
            f"expected one whose axes start with {', '.join(axes)}, such as resid_post"
        )
    return found[0]


def gather(study: Access, texts: Sequence[Text], names: Sequence[str], position: int | None = -1) -> dict[str, Tensor]:
    """One vector per text of each activation: name -> (texts, ...).

    Args:
        study: the study of the model.
        texts: texts, run one at a time, so that they may have different lengths.
        names: full names of activations whose axes start with batch and pos.
        position: position of the token to take; None: the mean over all tokens.

    Raises:
        DataError: `texts` is empty or a single string.
    """
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"texts: {texts!r}; expected a list of at least one text")
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for text in texts:
        _, cache = study.run_with_cache(text, names, positions=None if position is None else [position], stop=True)
        for name in names:
            rows[name] += list(cache[name].mean(1))
    return {name: torch.stack(vectors) for name, vectors in rows.items()}
