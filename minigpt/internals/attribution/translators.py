"""Lenses with an affine map per place, from the stream there to the final stream.

    tuned lens       trained so that what it reads comes closest to the model's own output   tuned.py
    Jacobian lens    the mean derivative of the end by the stream there   jacobian.py

Both are kept in the run's folder, beside its checkpoints, as tuned_lens.safetensors and jacobian_lens.safetensors, and
say which weights they were made for: for other weights they are refused.
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
from minigpt.model.layers import widen
from minigpt.terminal import notice

LOGITS_AT_ONCE = 2**22
MADE_BY = {"tuned": "train_tuned_lens", "jacobian": "fit_jacobian_lens"}


@dataclass
class Translators:
    """A map for each place of the stream but the last; a reader for `logit_lens`."""

    kind: str
    """tuned or jacobian."""
    matrices: dict[str, Tensor]
    """(C, C), by the place's full name: translated = matrix @ stream + bias."""
    biases: dict[str, Tensor]
    """(C), by the place's full name; none for a lens that has none."""
    model: str
    """The fingerprint of the model that it is for."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How it was made."""

    def __call__(self, point: Point, stream: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        """What a stream at a place will be at the end. The last stream stays as it is."""
        name = point.written_by.name
        if name not in self.matrices:
            return stream
        made = stream @ self.matrices[name].T.to(stream)
        return made + self.biases[name].to(stream) if name in self.biases else made

    def save(self, path: str | Path) -> Path:
        """Write it as a safetensors file: PLACE.weight and PLACE.bias, and kind, fingerprint and notes beside them."""
        path = Path(path)
        tensors = {f"{name}.weight": matrix for name, matrix in self.matrices.items()}
        tensors |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        told = {"kind": f"minigpt {self.kind} lens", "model": self.model, "notes": json.dumps(self.notes)}
        if path.is_file():
            notice(f"{path}: replaces the lens that was there")
        save_tensors(path, tensors, told)
        return path

    @classmethod
    def load(cls, path: str | Path, study: Access) -> Translators:
        """Read what `save` wrote. Raises CheckpointError for anything else, and for a lens of another model."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a lens that was trained for this model")
        tensors, told = load_tensors(path), load_metadata(path)
        kind = told.get("kind", "").removeprefix("minigpt ").removesuffix(" lens")
        if kind not in MADE_BY:
            raise CheckpointError(f"{path}: is no lens; expected a file that Translators.save wrote")
        if told.get("model") != fingerprint(study.model):
            raise CheckpointError(
                f"{path}: was made for other weights than those of {study.run.path if study.run else 'this model'}; "
                f"make it anew with {MADE_BY[kind]}, or give the path of one that fits"
            )
        matrices = {name.removesuffix(".weight"): t for name, t in tensors.items() if name.endswith(".weight")}
        biases = {name.removesuffix(".bias"): t for name, t in tensors.items() if name.endswith(".bias")}
        width = study.config.n_embd
        expected = {point.name: (width, width) for point in translated(study)}
        found = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
        if found != expected or any(bias.shape != (width,) or name not in found for name, bias in biases.items()):
            raise CheckpointError(f"{path}: its tensors are not one map for each place of this model; make it anew")
        try:
            notes = json.loads(told.get("notes", "{}"))
        except ValueError as error:
            raise CheckpointError(f"{path}: its notes cannot be read ({error}); make it anew") from error
        return cls(kind, matrices, biases, told["model"], notes)


def fingerprint(model: GPT) -> str:
    """Sha256 (hex) of the model's weights as float32, which is the same however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_of(model).items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def translated(study: Access) -> list[Point]:
    """The places that a lens translates: all but the last."""
    return points(study.config)[:-1]


def saved_lens(study: Access, kind: str) -> Path:
    """Where the lens of a run is kept. Raises ConfigError for a study of no run."""
    if study.run is None or study.run.path.parent.name != "checkpoints":
        raise ConfigError(
            f"{kind} lens: this model is of no run, in whose folder it could be kept; make it with "
            f"{MADE_BY[kind]}(..., save=False) and give it as lens="
        )
    return study.run.path.parent.parent / f"{kind}_lens.safetensors"


def _saved(study: Access, kind: str) -> Translators:
    path = saved_lens(study, kind)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is none yet; make it with minigpt lens {path.parent} --kind {kind} --train, or with "
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
    """The tuned lens (Belrose et al. 2023, arXiv 2303.08112): each place as its own trained map reads it.

    Args:
        study: of the model.
        text: one text.
        at: as of `logit_lens`.
        stat: as of `logit_lens`.
        answer: as of `logit_lens`.
        candidates: as of `logit_lens`.
        lens: from `train_tuned_lens`; None: the one in the run's folder.

    Raises:
        CheckpointError: there is none, or it is another model's.
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
    """The Jacobian lens (Gurnee et al. 2026): each place through the mean derivative of the last stream by it.

    Args:
        study: of the model.
        text: one text.
        at: as of `logit_lens`.
        stat: as of `logit_lens`.
        answer: as of `logit_lens`.
        candidates: as of `logit_lens`.
        lens: from `fit_jacobian_lens`; None: the one in the run's folder.

    Raises:
        CheckpointError: there is none, or it is another model's.
    """
    return logit_lens(study, text, at, stat, answer, candidates=candidates, reader=lens or _saved(study, "jacobian"))


def lens_quality(
    study: Access, *lenses: Translators, text: str | Sequence[int] | Tensor | Tokens | None = None, tokens: int = 2**14
) -> Result:
    """How close each place comes to the model's output, read by the logit lens and by others.

    Args:
        study: of the model.
        lenses: from `train_tuned_lens` or `fit_jacobian_lens`.
        text: to measure on; None: the validation split of the run's corpus.
        tokens: how many of it, at most.

    Returns:
        Axes stream and measure: for each lens KL(model's output || place) and the loss of the next token, in nats,
        means over all tokens that have a next one.
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
