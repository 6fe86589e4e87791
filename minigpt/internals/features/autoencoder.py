"""Sparse autoencoders and transcoders: an activation as a sum of a few of many directions.

    f = act((x - b_dec) W_enc + b_enc)      features, nearly all zero                (..., d_in) -> (..., d_sae)
    y = f W_dec + b_dec                     reconstruction                           (..., d_sae) -> (..., d_out)

An autoencoder reconstructs x. A transcoder (Dunefsky et al. 2024, arXiv 2406.11944) reads one activation and predicts
another, such as the output of an MLP from its input; it does not subtract b_dec first. The activation functions:

    topk        the k largest features of each token                     (Gao et al. 2024, arXiv 2406.04093)
    batchtopk   training: the k B largest of a batch of B tokens;
                inference: features above one common threshold           (Bussmann et al. 2024, arXiv 2412.06410)
    jumprelu    features above a learned threshold per feature           (Rajamanoharan et al. 2024, arXiv 2407.14435)

Training is in autoencoder_training.py, evaluation in autoencoder_metrics.py. Files have the format of SAELens: a folder
with cfg.json and sae_weights.safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from minigpt.checkpoint.manifest import read_json
from minigpt.checkpoint.tensors import load_tensors, save_tensors
from minigpt.durable import named_path, to_json, write_text
from minigpt.errors import CheckpointError, ConfigError
from minigpt.internals.access.access import Edit, Site
from minigpt.internals.features.autoencoder_config import Kind

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = "6.0.0"  # version of the SAELens file format that is written


def keep_greatest(pre: Tensor, k: int) -> Tensor:
    """Keep the positive values among the k largest of each row; set the rest to 0. (..., F) -> (..., F)"""
    values, places = pre.topk(min(k, pre.shape[-1]), -1)
    return torch.zeros_like(pre).scatter(-1, places, values.relu())


def keep_greatest_of_batch(pre: Tensor, k: int) -> Tensor:
    """Keep the positive values among the k B largest of all B rows; set the rest to 0. (B, F) -> (B, F)"""
    values, places = pre.flatten().topk(min(k * len(pre), pre.numel()))
    return torch.zeros_like(pre).flatten().scatter(0, places, values.relu()).view_as(pre)


@dataclass
class Autoencoder:
    """A trained autoencoder or transcoder with d_in inputs, d_sae features and d_out outputs."""

    site: str
    """Full name of the input activation."""
    target: str
    """Full name of the reconstructed activation; differs from `site` for a transcoder."""
    kind: Kind
    k: int
    """Features per token: the maximum (topk), or the target average (batchtopk, jumprelu)."""
    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae)
    W_dec: Tensor  # (d_sae, d_out), rows of unit length
    b_dec: Tensor  # (d_out)
    threshold: Tensor | None = None  # (d_sae); None for topk
    notes: dict[str, Any] = field(default_factory=dict)
    """Information about its training."""

    @property
    def transcodes(self) -> bool:
        """Whether it is a transcoder: reconstructs another activation than it reads."""
        return self.site != self.target

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.b_enc)

    def before(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_sae)
        """Features before the activation function."""
        x = x.to(self.W_enc)
        return (x if self.transcodes else x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_sae)
        """Features of the input."""
        pre = self.before(x)
        if self.threshold is None:
            return keep_greatest(pre, self.k)
        return pre.relu() * (pre > self.threshold)

    def decode(self, features: Tensor) -> Tensor:  # (..., d_sae) -> (..., d_out)
        """Reconstruct the target activation from features."""
        return features @ self.W_dec + self.b_dec

    def features(self, activation: Tensor) -> Tensor:
        """Features (B, T, d_sae) of an activation of the model, (B, T, d_in) or by heads (B, T, H, D)."""
        return self.encode(activation.flatten(2))

    def edits(self, change: Callable[[Tensor], Tensor] | None = None, *, keep_error: bool = False) -> dict[str, Edit]:
        """Edits for `Study.hooks` that replace the activation by its reconstruction.

        Args:
            change: modifies the features (B, T, d_sae) first, for example to switch one off.
            keep_error: add the reconstruction error, so that only `change` has an effect.
        """
        read: list[Tensor] = []  # a transcoder reads at one site and writes at a later one

        def take(activation: Tensor, site: Site) -> None:
            self._check(activation, site.name, len(self.W_enc))
            read[:] = [activation.flatten(2)]

        def put(activation: Tensor, site: Site) -> Tensor:
            self._check(activation, site.name, len(self.b_dec))
            if self.transcodes and not read:
                raise ConfigError(f"transcoder: {self.site} is not computed before {self.target}")
            plain = self.encode(read.pop() if self.transcodes else activation.flatten(2))
            features = plain if change is None else change(plain.clone())
            made = self.decode(features)
            if keep_error:
                made = made + activation.flatten(2).to(made) - self.decode(plain)
            return made.view_as(activation).to(activation)

        return {self.site: take, self.target: put} if self.transcodes else {self.site: put}

    def _check(self, activation: Tensor, name: str, width: int) -> None:
        if activation[0, 0].numel() != width:
            raise ConfigError(
                f"autoencoder: expects width {width} at {name}, but this model has width {activation[0, 0].numel()}; "
                "use one trained on this model"
            )

    def to(self, device: torch.device | str) -> Autoencoder:
        """Return a copy on `device`."""
        moved = {name: value.to(device) for name in TENSORS if isinstance(value := getattr(self, name), Tensor)}
        return Autoencoder(self.site, self.target, self.kind, self.k, **moved, notes=self.notes)

    # Files.

    def save(self, folder: str | Path) -> Path:
        """Write cfg.json and sae_weights.safetensors in the format of SAELens.

        SAELens can load autoencoders of every kind (batchtopk as jumprelu), and transcoders of kinds with a threshold.
        It has no topk transcoders.
        """
        folder = named_path(folder, "a folder to save an autoencoder in")
        tensors = {name: value for name in TENSORS if isinstance(value := getattr(self, name), Tensor)}
        architecture = "topk" if self.threshold is None else "jumprelu"
        config: dict[str, Any] = {
            "architecture": f"{architecture}_transcoder" if self.transcodes else architecture,
            "d_in": len(self.W_enc),
            "d_sae": self.d_sae,
            **({"d_out": len(self.b_dec)} if self.transcodes else {}),
            **({"k": self.k} if self.threshold is None else {}),
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": not self.transcodes,
            "normalize_activations": "none",
            "reshape_activations": "hook_z" if self.site.endswith("hook_z") and not self.transcodes else "none",
            "metadata": {
                "sae_lens_version": LAYOUT,
                "hook_name": self.site,
                **({"hook_name_out": self.target} if self.transcodes else {}),
                "prepend_bos": False,
                "minigpt": {"kind": self.kind, "k": self.k, **self.notes},
            },
        }
        save_tensors(folder / WEIGHTS, tensors)
        write_text(folder / CONFIG, to_json(config))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Autoencoder:
        """Load a folder written by `save` or SAELens: topk, jumprelu, transcoders of these, and standard (ReLU).

        Raises CheckpointError for other architectures, and for tensors that are missing or do not match.
        """
        folder = named_path(folder, "an autoencoder")
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: contains no {CONFIG}; expected the folder of an autoencoder")
        config, tensors = read_json(folder / CONFIG), load_tensors(folder / WEIGHTS)
        architecture = str(config.get("architecture"))
        plain = "standard" if architecture == "transcoder" else architecture.removesuffix("_transcoder")
        told = config.get("metadata") if isinstance(config.get("metadata"), dict) else config
        for name, value, expected in (
            ("architecture", plain, ("topk", "jumprelu", "standard")),
            ("normalize_activations", config.get("normalize_activations", "none"), ("none",)),
            ("rescale_acts_by_decoder_norm", config.get("rescale_acts_by_decoder_norm", False), (False,)),
        ):
            if value not in expected:
                raise CheckpointError(
                    f"{folder / CONFIG}: {name} is {config.get(name)!r}; expected {' or '.join(map(str, expected))}"
                )
        site = told.get("hook_name")  # type: ignore[union-attr]
        target = told.get("hook_name_out", site)  # type: ignore[union-attr]
        ours = told.get("minigpt", {})  # type: ignore[union-attr]
        kind = ours.get("kind", "topk" if plain == "topk" else "jumprelu") if isinstance(ours, dict) else None
        k = config.get("k", ours.get("k", 1) if isinstance(ours, dict) else None)
        if not isinstance(site, str) or not isinstance(target, str) or kind not in get_args(Kind):
            raise CheckpointError(f"{folder / CONFIG}: activation (metadata.hook_name) missing, or unknown kind")
        if not isinstance(k, int) or k < 1:
            raise CheckpointError(f"{folder / CONFIG}: k is {k!r}; expected a whole number from 1")
        if ("transcoder" in architecture) != (site != target):
            raise CheckpointError(
                f"{folder / CONFIG}: architecture {architecture} does not match its activations ({site}, {target}); "
                "only a transcoder has two different ones"
            )
        if plain == "standard" and "b_enc" in tensors:
            tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
        _check_tensors(folder / WEIGHTS, tensors, plain != "topk", site != target)
        kept = {name: tensors[name] for name in TENSORS if name in tensors}
        notes = {name: value for name, value in ours.items() if name not in ("kind", "k")}
        return cls(site, target, cast(Kind, kind), k, **kept, notes=notes)


TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def _check_tensors(path: Path, tensors: dict[str, Tensor], threshold: bool, transcodes: bool) -> None:
    needed = TENSORS if threshold else TENSORS[:-1]
    if set(tensors) != set(needed):
        raise CheckpointError(f"{path}: contains {', '.join(sorted(tensors))}; expected {', '.join(needed)}")
    if tensors["W_enc"].dim() != 2 or tensors["W_dec"].dim() != 2:
        raise CheckpointError(f"{path}: W_enc or W_dec is not a matrix")
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    shapes = {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)}
    for name in needed[1:]:
        if tuple(tensors[name].shape) != shapes[name]:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {shapes[name]}")
    if not transcodes and d_out != d_in:
        raise CheckpointError(f"{path}: input width {d_in} and output width {d_out} differ; expected equal widths")
