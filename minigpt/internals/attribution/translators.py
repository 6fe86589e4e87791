"""Lenses with an affine map per place, from the stream there to the final stream.

    tuned lens       trained to minimize the KL divergence from the model's output               tuned.py
    Jacobian lens    mean derivative of the final stream with respect to the stream at a point   jacobian.py

Both are saved in the run folder, as tuned_lens.safetensors and jacobian_lens.safetensors, with a fingerprint of the
weights that they were fitted for. Loading them for other weights is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.saving import state_of
from minigpt.checkpoint.tensors import load_metadata, load_tensors, save_tensors
from minigpt.errors import CheckpointError, ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import Tokens, tokens_of, windows
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text, need_two
from minigpt.internals.attribution.decomposition import KINDS, Point, points
from minigpt.internals.attribution.lens import Lens, Reader, Stat, lens_logits, logit_lens, statistic
from minigpt.model.gpt import GPT
from minigpt.model.precision import widen
from minigpt.terminal import notice

LOGITS_AT_ONCE = 2**22
MADE_BY = {"tuned": "train_tuned_lens", "jacobian": "fit_jacobian_lens"}


@dataclass
class Translators:
    """An affine map for each point of the stream except the last; a reader for `logit_lens`."""

    kind: str
    """tuned or jacobian."""
    matrices: dict[str, Tensor]
    """(C, C) by full name of the point: translated = matrix @ stream + bias."""
    biases: dict[str, Tensor]
    """(C) by full name of the point; empty for a lens without biases."""
    model: str
    """Fingerprint of the model that the lens was fitted for."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Settings of the fit."""

    def __call__(self, point: Point, stream: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        """Map the stream at a point to an estimate of the final stream; the final stream itself is unchanged."""
        name = point.written_by.name
        if name not in self.matrices:
            return stream
        made = stream @ self.matrices[name].T.to(stream)
        return made + self.biases[name].to(stream) if name in self.biases else made

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: tensors POINT.weight and POINT.bias; metadata: kind, fingerprint and notes."""
        path = Path(path)
        tensors = {f"{name}.weight": matrix for name, matrix in self.matrices.items()}
        tensors |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        told = {"kind": f"minigpt {self.kind} lens", "model": self.model, "notes": json.dumps(self.notes)}
        if path.is_file():
            notice(f"{path}: replacing the existing lens")
        save_tensors(path, tensors, told)
        return path

    @classmethod
    def load(cls, path: str | Path, study: Access) -> Translators:
        """Read a file written by `save`. Raises CheckpointError for other files and for a lens of another model."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a lens trained for this model")
        tensors, told = load_tensors(path), load_metadata(path)
        kind = told.get("kind", "").removeprefix("minigpt ").removesuffix(" lens")
        if kind not in MADE_BY:
            raise CheckpointError(f"{path}: not a lens; expected a file written by Translators.save")
        if told.get("model") != fingerprint(study.model):
            raise CheckpointError(
                f"{path}: was fitted for weights other than those of {study.run.path if study.run else 'this model'}; "
                f"fit a new one with {MADE_BY[kind]}, or give the path of a matching lens"
            )
        matrices = {name.removesuffix(".weight"): t for name, t in tensors.items() if name.endswith(".weight")}
        biases = {name.removesuffix(".bias"): t for name, t in tensors.items() if name.endswith(".bias")}
        width = study.config.n_embd
        expected = {point.name: (width, width) for point in translated(study)}
        found = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
        if found != expected or any(bias.shape != (width,) or name not in found for name, bias in biases.items()):
            raise CheckpointError(f"{path}: its tensors do not match the layers of this model; fit a new lens")
        try:
            notes = json.loads(told.get("notes", "{}"))
        except ValueError as error:
            raise CheckpointError(f"{path}: its notes cannot be read ({error}); fit a new lens") from error
        return cls(kind, matrices, biases, told["model"], notes)


def fingerprint(model: GPT) -> str:
    """Sha256 (hex) of the model's weights converted to float32, so that it does not depend on the stored dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_of(model).items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def translated(study: Access) -> list[Point]:
    """Points that a lens has a map for: all but the last."""
    return points(study.config)[:-1]


def saved_lens(study: Access, kind: str) -> Path:
    """Path of the lens file of a run. Raises ConfigError if the study has no run."""
    if study.run is None or study.run.path.parent.name != "checkpoints":
        raise ConfigError(
            f"{kind} lens: this model has no run folder to save it in; fit it with {MADE_BY[kind]}(..., save=False) "
            "and pass it as lens="
        )
    return study.run.path.parent.parent / f"{kind}_lens.safetensors"


def _saved(study: Access, kind: str) -> Translators:
    path = saved_lens(study, kind)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; fit the lens with minigpt lens {path.parent} --kind {kind} --train, or with "
            f"study.{MADE_BY[kind]}()"
        )
    return Translators.load(path, study)


def tuned_lens(
    study: Access,
    text: Text,
    at: str | Iterable[str] = KINDS,
    stat: Stat = "top",
    answer: str | int | None = None,
    *,
    candidates: int = 10,
    lens: Translators | None = None,
) -> Lens:
    """Apply the tuned lens (Belrose et al. 2023, arXiv 2303.08112): a trained affine map per point.

    Args:
        study: the study of the model.
        text: one text.
        at: see `logit_lens`.
        stat: see `logit_lens`.
        answer: see `logit_lens`.
        candidates: see `logit_lens`.
        lens: a lens from `train_tuned_lens`; None: the lens in the run folder.

    Raises:
        CheckpointError: the run folder has no lens, or it was trained for another model.
    """
    return logit_lens(study, text, at, stat, answer, candidates=candidates, reader=lens or _saved(study, "tuned"))


def jacobian_lens(
    study: Access,
    text: Text,
    at: str | Iterable[str] = KINDS,
    stat: Stat = "top",
    answer: str | int | None = None,
    *,
    candidates: int = 10,
    lens: Translators | None = None,
) -> Lens:
    """Apply the Jacobian lens (Gurnee et al. 2026): the mean derivative of the final stream per point.

    Args:
        study: the study of the model.
        text: one text.
        at: see `logit_lens`.
        stat: see `logit_lens`.
        answer: see `logit_lens`.
        candidates: see `logit_lens`.
        lens: a lens from `fit_jacobian_lens`; None: the lens in the run folder.

    Raises:
        CheckpointError: the run folder has no lens, or it was fitted for another model.
    """
    return logit_lens(study, text, at, stat, answer, candidates=candidates, reader=lens or _saved(study, "jacobian"))


def lens_quality(
    study: Access, *lenses: Translators, text: str | Sequence[int] | Tensor | Tokens | None = None, tokens: int = 2**14
) -> Result:
    """Measure how closely the logit lens and other lenses approximate the model's output at each point.

    Args:
        study: the study of the model.
        lenses: lenses from `train_tuned_lens` or `fit_jacobian_lens`.
        text: text to measure on; None: the validation split of the run's corpus.
        tokens: maximum number of tokens.

    Returns:
        A result with the axes stream and measure. For each lens the measures are KL(model's output || point) and the
        loss of the next token, in nats, averaged over all tokens that have a next one.
    """
    corpus = tokens_of(study, text)
    readers: dict[str, Reader | None] = {"logit": None}
    for lens in lenses:
        twin = sum(isinstance(one, Translators) and one.kind == lens.kind for one in readers.values())
        readers[f"{lens.kind} {twin + 1}" if twin else lens.kind] = lens
    where = points(study.config)
    sums = torch.zeros(len(where), len(readers), 2, dtype=torch.float64)
    count = 0
    width = min(study.config.block_size, len(corpus))
    need_two(width)
    rows = max(1, LOGITS_AT_ONCE // (width * study.model.vocab_size))
    for _, ids in windows(corpus, width, rows, limit=tokens):
        ids = study.ids(ids)
        if ids.shape[1] < 2:
            continue
        output = widen(study.logits(ids)[:, :-1]).log_softmax(-1).flatten(0, 1)  # (B (T - 1), V)
        targets = ids[:, 1:].flatten()
        count += len(targets)
        for column, reader in enumerate(readers.values()):
            for row, (_, logits) in enumerate(lens_logits(study, ids, where, reader)):
                log_p = widen(logits[:, :-1]).log_softmax(-1).flatten(0, 1)
                for measure, stat in enumerate(("kl", "loss")):
                    sums[row, column, measure] += statistic(stat, log_p, output, targets).sum().cpu().double()
    labels = [f"{kind} {measure}" for kind in readers for measure in ("kl", "loss")]
    axes = (Axis("stream", [point.label for point in where]), Axis("measure", labels))
    return Result("lenses", (sums.flatten(1) / count).numpy(), axes, "nats", {"tokens": count})
