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
    """Many token ids in a row, of which any window can be read; a `minigpt.data.stream.TokenStream` is one."""

    def __len__(self) -> int: ...

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows [start, start + length), (n, length) int64."""


class InMemory:
    """Token ids that are in memory."""

    def __init__(self, ids: Sequence[int] | np.ndarray) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.ids[np.asarray(starts)[:, None] + np.arange(length)]


def tokens_of(study: Access, text: str | Sequence[int] | Tensor | Tokens | None = None, split: str = "val") -> Tokens:
    """Tokens to study a model on.

    Args:
        study: whose tokenizer reads the text.
        text: a text or token ids of any length; None: the corpus that the study's run was trained on.
        split: of that corpus: "val" or "train".

    Raises:
        ConfigError: no text is given, and the study's model was not trained here.
        DataError: the run's corpus has changed, or is shorter than two tokens.
    """
    if text is None:
        if study.run is None or not study.run.config:
            raise ConfigError("text: the model was not trained here, so it has no corpus of its own; give a text")
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
        study.ids([[int(tokens.ids.min())], [int(tokens.ids.max())]])  # refuses what the model does not have
    if len(tokens) < 2:
        raise DataError(f"text: holds {len(tokens)} tokens, too few to study; give more")
    return tokens


def windows(tokens: Tokens, width: int, rows: int = 32, limit: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """All tokens once, in order: where the first row begins, and ids (B, T) of neighbouring windows.

    Args:
        tokens: see `tokens_of`.
        width: T; the last window may be shorter, and then comes alone.
        rows: B, at most.
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
    """Windows from anywhere, without end: ids (rows, T). The seed decides which."""
    width = min(width, len(tokens))
    generator = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(tokens.read(generator.integers(len(tokens) - width + 1, size=rows), width))


def site_of(study: Access, name: Names, axes: tuple[str, ...] = ("batch", "pos")) -> str:
    """The full name of the one activation that is meant.

    Raises ConfigError where several are, or where it does not begin with these axes.
    """
    found = select(study.config, name)
    if len(found) != 1:
        raise ConfigError(f"activation {name!r}: is {len(found)} of the model's; name one, as in ('resid_post', 0)")
    if study.table[found[0]].axes[: len(axes)] != axes:
        raise ConfigError(
            f"activation {found[0]}: its axes are {', '.join(study.table[found[0]].axes)}; "
            f"expected one that begins with {', '.join(axes)}, such as resid_post"
        )
    return found[0]


def gather(study: Access, texts: Sequence[Text], names: Sequence[str], position: int | None = -1) -> dict[str, Tensor]:
    """One vector per text of each activation: name -> (texts, ...).

    Args:
        study: whose model reads.
        texts: each on its own, so that they may be of different lengths.
        names: full names of activations that begin with batch and pos.
        position: which token's; None: the mean over all tokens.

    Raises:
        DataError: there is no text.
    """
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"texts: {texts!r}; expected a list of at least one text")
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for text in texts:
        _, cache = study.run_with_cache(text, names, positions=None if position is None else [position], stop=True)
        for name in names:
            rows[name] += list(cache[name].mean(1))
    return {name: torch.stack(vectors) for name, vectors in rows.items()}
