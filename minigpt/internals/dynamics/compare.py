"""Compare two models, such as two checkpoints of a run: loss per token and similarity of their streams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.dynamics.context import in_parts
from minigpt.model.config import GPTConfig


@dataclass
class Comparison:
    """The differences between two models on the same text. Prints all its parts."""

    losses: Result
    """Loss of the other model minus the study's, for each token, in nats; with several rows, the mean per position."""
    similarity: Result
    """Linear CKA between each layer of the study's model (rows) and of the other (columns), from 0 to 1."""
    cosine: Result | None
    """Mean cosine similarity of the streams at the same layer; None if their shapes differ."""

    @property
    def parts(self) -> list[Result]:
        """All parts that are not None."""
        return [part for part in (self.losses, self.similarity, self.cosine) if part is not None]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.parts))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self.parts)


def compare(study: Access, other: Access, text: Text) -> Comparison:
    """Compare two models on the same text.

    Args:
        study: study of the first model.
        other: study of the second model. It may have any shape, but must encode the text as the same tokens.
        text: one text, or token ids (B, T). The similarities need more tokens than the models have channels.

    Raises:
        DataError: the two models encode the text as different tokens.
    """
    ids = study.ids(text)
    if not isinstance(text, Tensor) and not torch.equal(ids.cpu(), other.ids(text).cpu()):
        raise DataError("text: the two models encode it as different tokens; compare models with the same tokenizer")
    mine, theirs = _run(study, ids), _run(other, ids)
    more = theirs.losses - mine.losses
    notes = {"mean": float(more.mean()), "study": float(mine.losses.mean()), "other": float(theirs.losses.mean())}
    if len(ids) == 1:
        tokens = [f"{position} {token}" for position, token in enumerate(study.tokens(ids))]
        axis = Axis("token", tokens[1:])
    else:
        axis = Axis("position", [str(position) for position in range(1, ids.shape[1])])
    losses = Result("Loss of the other model minus the study's", more.mean(0).numpy(), (axis,), "nats", notes)
    similar = np.array([[cka(x, y) for y in theirs.streams] for x in mine.streams])
    axes = Axis("layer", _layers(study.config)), Axis("other's layer", _layers(other.config))
    similarity = Result("Similarity of the streams (linear CKA)", similar, axes, "", {"tokens": ids.numel()})
    cosine = None
    if [x.shape for x in mine.streams] == [y.shape for y in theirs.streams]:
        values = [torch.cosine_similarity(x, y, -1).mean() for x, y in zip(mine.streams, theirs.streams, strict=True)]
        cosine = Result(
            "Cosine similarity of the streams", torch.stack(values).numpy(), (Axis("layer", _layers(study.config)),)
        )
    return Comparison(losses, similarity, cosine)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) of N tokens in two models:

        ||X'Y||^2 / (||X'X|| ||Y'Y||), with centred columns and Frobenius norms

    It is 1 if one is the other rotated, reflected and scaled. With fewer tokens than channels it is always high.

    Args:
        x: (N, C).
        y: (N, C').
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(x.T @ y) ** 2 / norms) if norms > 0 else float("nan")


@dataclass
class _Seen:
    losses: Tensor  # (B, T - 1)
    streams: list[Tensor]  # before the first block and after each, (B T, C)


def _run(study: Access, ids: Tensor) -> _Seen:
    losses, streams = [], []
    for part in in_parts(study, ids):
        names: list[str | tuple[str, int]] = [("resid_pre", 0), "resid_post"]
        losses.append(study.losses(part))
        _, cache = study.run_with_cache(part, names, device="cpu", stop=True)
        streams.append([cache["resid_pre", 0], *cache.stack("resid_post")])
    return _Seen(torch.cat(losses).cpu(), [torch.cat(parts).flatten(0, 1) for parts in zip(*streams, strict=True)])


def _layers(config: GPTConfig) -> list[str]:
    return ["embed", *map(str, range(config.n_layer))]
