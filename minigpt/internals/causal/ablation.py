"""Ablation: the output without a head or an MLP.

Taking a part away is putting something in the place of what it writes to the stream:

    zero        nothing (a head's z is 0, so of attention's output only the bias is left)
    mean        the mean of what it writes over a sample of text: its constant part stays
    resample    what it writes on another text, so that what the model sees is likely in itself

With "zero" a model may meet a stream that it never meets, so that the mean is often the fairer question.
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
    """What the output loses without each head and each MLP: part x (loss, KL, flips).

    Args:
        study: see `Study`.
        text: one, or several of equal length; the more of it, the surer the figures.
        how: what stands in the part's place: zero, mean or resample.
        sample: for mean: text to take the mean over; None: the text itself. For resample: texts of the same length to
            take what the part writes from; None: the text's own rows, each another's.
        parts: head, mlp or all.
        seed: of which row gets whose, for resample.

    Returns:
        The loss increase (nats per token), KL(with || without) (nats), and the fraction of positions whose most likely
        token changes. `.top()` sorts them.

    Raises:
        ConfigError: edits are open, or there is no such way or part.
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
    """Raise ConfigError where edits are open: what goes on from a base run would not see them."""
    if study.watch().edits:
        raise ConfigError(f"{what}: inside `with study.hooks(...)`, whose edits it would not see; call it outside")


def _instead(
    study: Access, ids: Tensor, base: Base, how: str, sample: Text | None, seed: int
) -> dict[tuple[str, int], Tensor]:
    """What stands in each part's place: of every layer z (B, T, H, D) and mlp_out (B, T, C)."""
    other, names = (ids if sample is None else study.ids(sample)), ("z", "mlp_out")
    seen = base.seen if sample is None else study.run_with_cache(other, names)[1]
    found = {(name, layer): seen[name, layer] for name in names for layer in range(study.config.n_layer)}
    if how == "mean":
        return {key: value.mean((0, 1)).expand(*ids.shape, *value.shape[2:]) for key, value in found.items()}
    generator = torch.Generator().manual_seed(seed)
    if sample is None:
        if len(ids) < 2:
            raise DataError("text: one row has no other to take from; give several, or sample=")
        # Shifted along a shuffled circle: no row gets its own.
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
