"""Steering vectors: a direction from two sets of texts, added to an activation.

    happy = study.steering_vector(["I love it", ...], ["I hate it", ...], ("resid_post", 2))
    with study.hooks(happy.edits(4)):
        study.generate("I think")
    happy.save("happy.safetensors")    # minigpt sample RUN --steer happy.safetensors --steer_scale 4

The mean difference is that of Turner et al. 2023 (arXiv 2308.10248) and Rimsky et al. 2023 (arXiv 2312.06681), the
principal component that of Zou et al. 2023 (arXiv 2310.01405).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt.checkpoint.tensors import load_metadata, load_tensors, save_tensors
from minigpt.errors import CheckpointError, ConfigError
from minigpt.internals.access.access import Access, Edit, Edits, Site
from minigpt.internals.access.corpus import gather, site_of
from minigpt.internals.access.text import Text
from minigpt.internals.access.writing import Written
from minigpt.model.cache import KVCache

KIND = "minigpt steering vector"


@dataclass
class Steering:
    """A direction of one activation."""

    name: str
    """The activation's full name, such as blocks.2.hook_resid_post."""
    vector: Tensor
    """Of the activation's shape after batch and pos: (C), or (H, D) for a head's."""
    scale: float = 1.0
    """How many times it is added where nothing else is said; 1 is the difference between the texts that made it."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How it was made."""

    def edits(self, scale: float | None = None) -> dict[str, Edit]:
        """For `Study.hooks`: add `scale` times the vector at every position. Raises ConfigError, when it runs, for a
        model of another width.
        """
        times = self.scale if scale is None else scale

        def steer(activation: Tensor, site: Site) -> Tensor:
            if activation.shape[2:] != self.vector.shape:
                raise ConfigError(
                    f"steering vector: is {tuple(self.vector.shape)}, but {site.name} of this model is "
                    f"{tuple(activation.shape[2:])}; use one made with this model"
                )
            return activation + times * self.vector.to(activation)

        return {self.name: steer}

    def save(self, path: str | Path) -> Path:
        """Write it as a safetensors file: the tensor "vector", and name, scale and notes beside it."""
        path = Path(path)
        told = {"kind": KIND, "name": self.name, "scale": repr(self.scale), "notes": json.dumps(self.notes)}
        save_tensors(path, {"vector": self.vector}, told)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read what `save` wrote. Raises CheckpointError for anything else; no code in a file ever runs."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a steering vector that Steering.save wrote")
        tensors, told = load_tensors(path), load_metadata(path)
        vector = tensors.get("vector")
        if told.get("kind") != KIND or vector is None or "name" not in told:
            raise CheckpointError(f"{path}: is no steering vector; expected a file that Steering.save wrote")
        if not vector.is_floating_point() or not bool(torch.isfinite(vector).all()):
            raise CheckpointError(f"{path}: its vector does not hold finite numbers; make it again")
        try:
            scale, notes = float(told.get("scale", "1")), json.loads(told.get("notes", "{}"))
        except ValueError as error:
            raise CheckpointError(f"{path}: its scale or notes cannot be read ({error}); make it again") from error
        return cls(told["name"], vector, scale, notes)


class Steered(Written):
    """A sampler's model, steered wherever it reads: `Sampler(Steered(study, happy.edits(4)), study.tokenizer)`.

    Raises ConfigError where the edits do not fit the model.
    """

    def __init__(self, study: Access, edits: Edits) -> None:
        super().__init__(study)
        self.edits = edits
        with study.hooks(edits):
            study.logits([0])  # a mistake is told before anything is written

    def hidden(self, ids: Tensor, cache: KVCache | None) -> Tensor:
        with self.study.hooks(self.edits):
            return super().hidden(ids, cache)


def steering_vector(
    study: Access,
    positive: Sequence[Text],
    negative: Sequence[Text],
    at: str | tuple[str, int],
    *,
    method: Literal["mean", "pca"] = "mean",
    position: int | None = -1,
) -> Steering:
    """The direction from one kind of text to another.

    Args:
        study: whose model reads them.
        positive: texts of the kind to steer towards.
        negative: texts of the other kind; with pca as many, each the counterpart of the positive one in its place.
        at: the activation.
        method: mean: the difference of the two means. pca: the direction along which the pairs' differences are longest
            (their first right singular vector), as long as the mean difference is along it.
        position: of the token whose activation counts; None: the mean over all of a text's tokens.

    Raises:
        ConfigError: the activation has no positions, or is not one; with pca, unequal numbers of texts.
    """
    name = site_of(study, at)
    if method not in ("mean", "pca"):
        raise ConfigError(f"method: {method!r} is none of mean, pca")
    towards = gather(study, positive, [name], position)[name]  # (texts, ...)
    away = gather(study, negative, [name], position)[name]
    difference = towards.mean(0) - away.mean(0)
    notes: dict[str, Any] = {"method": method, "positive": len(towards), "negative": len(away), "position": position}
    if method == "pca":
        if len(towards) != len(away):
            raise ConfigError(f"pca: {len(towards)} positive and {len(away)} negative texts; expected pairs")
        pairs = (towards - away).flatten(1).double()
        _, lengths, directions = torch.linalg.svd(pairs, full_matrices=False)
        along = (pairs @ directions[0]).mean()  # its sign, which a singular vector leaves open, is the mean's
        difference = (along * directions[0]).to(difference).view_as(difference)
        notes["share"] = float(lengths[0] ** 2 / lengths.square().sum().clamp_min(1e-300))
    return Steering(name, difference.cpu(), notes=notes)
