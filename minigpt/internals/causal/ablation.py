"""Ablation: the output without a head or an MLP.

Ablating a part replaces its output with something else:

    zero        zero (a head's z is 0; the attention bias stays)
    mean        its mean over a sample of text, so that its constant contribution stays
    resample    its output on another text, so that the replacement is a realistic value

Zero ablation can put the stream out of distribution; mean ablation is often the fairer choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.weights import write_weights
from minigpt.internals.causal.effect import MEASURES, changes
from minigpt.internals.causal.resume import Base, Change

How = Literal["zero", "mean", "resample"]


def ablate(
    study: Access,
    text: Text,
    how: How = "zero",
    *,
    sample: Text | None = None,
    parts: Literal["head", "mlp", "all"] = "all",
    seed: int = 0,
) -> Result:
    """Ablate each head and each MLP separately: part x (loss, KL, flips).

    Args:
        study: see `Study`.
        text: one text, or several of equal length. More text gives more reliable numbers.
        how: replacement of the part's output: zero, mean or resample.
        sample: for mean: text to take the mean over; None: `text`. For resample: texts of the same length to take the
            outputs from; None: the rows of `text`, each from another row.
        parts: head, mlp or all.
        seed: seed of the assignment of rows for resample.

    Returns:
        The loss increase (nats per token), KL(with || without) (nats), and the fraction of positions whose most likely
        token changes. `.top()` sorts them.

    Raises:
        ConfigError: edits are active, or `how` or `parts` is invalid.
    """
    if how not in ("zero", "mean", "resample"):
        raise ConfigError(f"how: {how!r}; expected zero, mean or resample")
    if parts not in ("head", "mlp", "all"):
        raise ConfigError(f"parts: {parts!r}; expected head, mlp or all")
    refuse_edits(study, "ablate")
    ids = study.ids(text)
    base = Base(study, ids, ["z", "mlp_out"])
    instead = None if how == "zero" else _instead(study, ids, base, how, sample, seed)
    labels, values = [], []
    for layer in range(study.config.n_layer):
        sites, mid = [], base.stream(layer, "mid")
        if parts != "mlp":
            z = base.seen["z", layer]  # (B, T, H, D)
            other = torch.zeros_like(z) if instead is None else instead["z", layer]
            added = torch.einsum("bthd,hdc->bthc", other - z, write_weights(study.model, layer))
            labels += [f"L{layer}H{head}" for head in range(study.config.n_head)]
            sites += [Change(layer, "mid", 0, mid + added[:, :, head]) for head in range(study.config.n_head)]
        if parts != "head":
            other = torch.zeros_like(mid) if instead is None else instead["mlp_out", layer]
            labels.append(f"L{layer} mlp")
            sites.append(Change(layer, "post", 0, mid + other))
        found = torch.empty(len(sites), len(MEASURES))
        for indices, logits in base.resume(sites, range(ids.shape[1])):
            found[indices] = changes(base.logits, logits, ids).to(found)
        values.append(found)
    axes = (Axis("part", labels), Axis("measure", list(MEASURES)))
    unit, notes = "nats per token; nats; share", {"tokens": ids.numel()}
    return Result(f"Without each part ({how})", torch.cat(values).numpy(force=True), axes, unit, notes)


def refuse_edits(study: Access, what: str) -> None:
    """Raise ConfigError if edits are active, because resumed forward passes ignore them."""
    if study.watch().edits:
        raise ConfigError(f"{what}: called inside `with study.hooks(...)`, whose edits it ignores; call it outside")


def _instead(
    study: Access, ids: Tensor, base: Base, how: str, sample: Text | None, seed: int
) -> dict[tuple[str, int], Tensor]:
    """Replacement outputs: z (B, T, H, D) and mlp_out (B, T, C) of every layer."""
    other, names = (ids if sample is None else study.ids(sample)), ("z", "mlp_out")
    seen = base.seen if sample is None else study.run_with_cache(other, names)[1]
    found = {(name, layer): seen[name, layer] for name in names for layer in range(study.config.n_layer)}
    if how == "mean":
        return {key: value.mean((0, 1)).expand(*ids.shape, *value.shape[2:]) for key, value in found.items()}
    generator = torch.Generator().manual_seed(seed)
    if sample is None:
        if len(ids) < 2:
            raise DataError("text: resample needs at least two rows; give several texts, or sample=")
        # A random cyclic permutation: no row gets its own output.
        circle = torch.randperm(len(ids), generator=generator)
        rows = torch.empty_like(circle)
        rows[circle] = circle.roll(1)
    else:
        if other.shape[1] != ids.shape[1]:
            raise DataError(
                f"sample: {other.shape[1]} tokens per row, but the text has {ids.shape[1]}; give equal numbers"
            )
        rows = torch.randint(len(other), (len(ids),), generator=generator)
    return {key: value[rows] for key, value in found.items()}
