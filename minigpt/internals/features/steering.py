"""Steering vectors: a direction from two sets of texts, added to an activation.

    happy = study.steering_vector(["I love it", ...], ["I hate it", ...], ("resid_post", 2))
    with study.hooks(happy.edits(4)):
        study.generate("I think")
    happy.save("happy.safetensors")    # minigpt sample RUN --steer happy.safetensors --steer_scale 4

Method "mean" follows Turner et al. 2023 (arXiv 2308.10248) and Rimsky et al. 2023 (arXiv 2312.06681), method "pca" Zou
et al. 2023 (arXiv 2310.01405).
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
    """A steering vector for one activation."""

    name: str
    """Full name of the activation, such as blocks.2.hook_resid_post."""
    vector: Tensor
    """The direction, with the shape of the activation without batch and pos: (C), or (H, D) for heads."""
    scale: float = 1.0
    """Default factor; 1 is the difference between the two sets of texts."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How the vector was computed."""

    def edits(self, scale: float | None = None) -> dict[str, Edit]:
        """Edits for `Study.hooks` that add `scale` times the vector at every position.

        A model of another width raises ConfigError in the forward pass.
        """
        times = self.scale if scale is None else scale

        def steer(activation: Tensor, site: Site) -> Tensor:
            if activation.shape[2:] != self.vector.shape:
                raise ConfigError(
                    f"steering vector: has shape {tuple(self.vector.shape)}, but {site.name} of this model has "
                    f"{tuple(activation.shape[2:])}; use a vector computed with this model"
                )
            return activation + times * self.vector.to(activation)

        return {self.name: steer}

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the tensor "vector"; name, scale and notes are in its metadata."""
        path = Path(path)
        told = {"kind": KIND, "name": self.name, "scale": repr(self.scale), "notes": json.dumps(self.notes)}
        save_tensors(path, {"vector": self.vector}, told)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Load a file written by `save`, without executing code from it. Raises CheckpointError for other files."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a steering vector written by Steering.save")
        tensors, told = load_tensors(path), load_metadata(path)
        vector = tensors.get("vector")
        if told.get("kind") != KIND or vector is None or "name" not in told:
            raise CheckpointError(f"{path}: not a steering vector; expected a file written by Steering.save")
        if not vector.is_floating_point() or not bool(torch.isfinite(vector).all()):
            raise CheckpointError(f"{path}: its vector contains non-finite values; compute it again")
        try:
            scale, notes = float(told.get("scale", "1")), json.loads(told.get("notes", "{}"))
        except ValueError as error:
            raise CheckpointError(f"{path}: its scale or notes cannot be read ({error}); compute it again") from error
        return cls(told["name"], vector, scale, notes)


class Steered(Written):
    """A sampler's model with edits in every forward pass: `Sampler(Steered(study, happy.edits(4)), study.tokenizer)`.

    Raises ConfigError if the edits do not fit the model.
    """

    def __init__(self, study: Access, edits: Edits) -> None:
        super().__init__(study)
        self.edits = edits
        with study.hooks(edits):
            study.logits([0])  # report a mismatch before generation starts

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
    """Compute the direction from one set of texts to another.

    Args:
        study: the study of the model.
        positive: texts to steer towards.
        negative: texts to steer away from; for pca, text i is the counterpart of positive text i.
        at: the activation.
        method: mean: the difference of the two means. pca: the first right singular vector of the pairwise differences,
            scaled to the projection of the mean difference onto it.
        position: position of the token to take; None: the mean over all tokens of a text.

    Raises:
        ConfigError: the activation has no positions, or the name matches several; for pca, unequal numbers of texts.
    """
    name = site_of(study, at)
    if method not in ("mean", "pca"):
        raise ConfigError(f"method: {method!r} is not one of mean, pca")
    towards = gather(study, positive, [name], position)[name]  # (texts, ...)
    away = gather(study, negative, [name], position)[name]
    difference = towards.mean(0) - away.mean(0)
    notes: dict[str, Any] = {"method": method, "positive": len(towards), "negative": len(away), "position": position}
    if method == "pca":
        if len(towards) != len(away):
            raise ConfigError(f"pca: {len(towards)} positive and {len(away)} negative texts; expected pairs")
        pairs = (towards - away).flatten(1).double()
        _, lengths, directions = torch.linalg.svd(pairs, full_matrices=False)
        along = (
            pairs @ directions[0]
        ).mean()  # takes the sign of the mean, since the sign of a singular vector is arbitrary
        difference = (along * directions[0]).to(difference).view_as(difference)
        notes["share"] = float(lengths[0] ** 2 / lengths.square().sum().clamp_min(1e-300))
    return Steering(name, difference.cpu(), notes=notes)
