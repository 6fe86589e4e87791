"""Activation patching: which activations carry the difference between two texts.

The model runs on a corrupted text. One activation at a time is replaced by its value on a clean text with the same
number of tokens. The change of the output towards the clean output measures how much of the difference the activation
carries.

    clean      "When Mary and John went out, John gave it to"   -> Mary
    corrupted  "When Mary and John went out, Mary gave it to"   -> John
    patch(study, clean, corrupted, logit_difference(" Mary", " John"), at="z", by=("layer", "head"))

The values are exact, one forward per site; but each costs only the layers after it and the positions from it on (see
resume.py). `attribution_patch` guesses them all from one backward pass and says how well it guessed.
(Meng et al. 2022, arXiv 2202.05262; Wang et al. 2022, arXiv 2211.00593; by gradient: Syed et al. 2023, arXiv
2310.10348.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.names import listed
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.weights import write_weights
from minigpt.internals.causal.effect import Bound, Metric, as_metric
from minigpt.internals.causal.resume import Base, Change
from minigpt.model.cache import causal_step
from minigpt.model.explicit import explicit_attention
from minigpt.model.gpt import Block
from minigpt.model.precision import precise

# Sites that can be patched, and the activations of both runs that each needs.
STREAM: dict[str, list[str]] = {
    "resid_pre": ["resid_pre"],
    "resid_mid": ["resid_mid"],
    "resid_post": ["resid_post"],
    "attn_out": ["attn_out"],
    "mlp_out": ["mlp_out"],
}
HEADS: dict[str, list[str]] = {
    "z": ["z"],
    "q": ["q", "k", "v", "z"],
    "k": ["q", "k", "v", "z", "attn_scores"],
    "v": ["v", "pattern"],
    "pattern": ["pattern", "v", "z"],
}
SITES = STREAM | HEADS

AnyMetric = Metric | Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """One site; None means all heads, or all positions."""

    layer: int
    head: int | None
    pos: int | None


def patch(
    study: Access,
    clean: Text,
    corrupted: Text,
    metric: AnyMetric,
    at: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    *,
    slow: bool = False,
) -> Result:
    """Patch one activation at a time; return the change of the metric on the corrupted text.

    Args:
        study: see `Study`.
        clean: one text, or several of equal length.
        corrupted: the same number of texts of the same length.
        metric: logit_difference(...), loss(), kl(), or a function of logits (B, T, V).
        at: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v or pattern.
        by: the axes of the result beside the layer, which comes first: "head", "pos", "head,pos" or a list of them;
            what is left out is patched all at once. None: pos in the stream, head elsewhere. Heads of k and v are the
            key/value heads; positions of a pattern are the queries'.
        slow: one whole forward per site, by edits: the definition. So it is done anyway while edits are open.

    Returns:
        The change of the metric at each site. The notes hold the metric on the clean and on the corrupted text:
        patching everything changes the metric by their difference.

    Raises:
        ConfigError: invalid site, axis or metric.
        DataError: the texts have different numbers of tokens.
    """
    ids, other, bound, metric = bind_pair(study, clean, corrupted, metric)
    places, axes = _places(study, ids, other, at, by)
    with_clean = bound.of(study.logits(ids)[:, bound.positions])
    without = bound.of(study.logits(other)[:, bound.positions])
    one_by_one = slow or bool(study.watch().edits)
    values = (_by_edits if one_by_one else _by_resuming)(study, ids, other, bound, at, places)
    shape = tuple(len(axis.labels) for axis in axes)
    changed = precise(values - without).reshape(shape).numpy()
    notes = {"clean": float(with_clean), "corrupted": float(without)}
    return Result(f"Change of {metric.name} by patching {at}", changed, axes, metric.unit, notes)


def attribution_patch(
    study: Access,
    clean: Text,
    corrupted: Text,
    metric: AnyMetric,
    at: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    *,
    exact: bool = True,
) -> Result:
    """Attribution patching: estimate the values of `patch` from one backward pass.

    The estimate is (a_clean - a_corrupted) · d metric / d a, with the gradient at the corrupted run.

    Args:
        study: see `Study`.
        clean: one text, or several of equal length.
        corrupted: the same number of texts of the same length.
        metric: see `patch`.
        at: see `patch`.
        by: see `patch`.
        exact: also run exact patching, to check the estimate.

    Returns:
        The estimated change of the metric at each site. With `exact`, a first axis "way" holds the estimate ("guess")
        and the exact value ("exact"), and the notes hold their rank correlation.
    """
    ids, other, bound, metric = bind_pair(study, clean, corrupted, metric)
    _, axes = _places(study, ids, other, at, by)
    by = [axis.name for axis in axes]
    names = [(at, layer) for layer in range(study.config.n_layer)]
    _, target = study.run_with_cache(ids, names)
    _, here, gradients = study.gradients(other, lambda logits: bound.of(logits[:, bound.positions]), names)
    named = [{"kv_head": "head"}.get(axis, axis) for axis in target.axes((at, 0))]
    summed = [i for i, axis in enumerate(named) if axis not in by]
    guesses = [((target[name] - here[name]) * gradients[name]).sum(summed) for name in names]
    left = [axis for axis in named if axis in by]
    guess = precise(torch.stack(guesses).permute(0, *(1 + left.index(axis) for axis in by[1:]))).numpy()
    title, unit = f"Change of {metric.name} by patching {at}, estimated by gradient", metric.unit
    if not exact:
        return Result(title, guess, axes, unit)
    true = patch(study, ids, other, metric, at, by)
    notes = {**true.notes, "rank correlation": rank_correlation(guess, true.values)}
    return Result(title, np.stack([guess, true.values]), (Axis("way", ["guess", "exact"]), *axes), unit, notes)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; values that agree to a millionth of the largest are ties."""

    def ranks(values: np.ndarray) -> np.ndarray:
        rounded = np.round(values.reshape(-1) / (np.abs(values).max() or 1.0), 6)
        _, which, counts = np.unique(rounded, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[which]

    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def bind_pair(study: Access, clean: Text, corrupted: Text, metric: AnyMetric) -> tuple[Tensor, Tensor, Bound, Metric]:
    """Return the ids (B, T) of both texts, the bound metric and the metric. Raises DataError for different shapes."""
    ids, other = study.ids(clean), study.ids(corrupted)
    if ids.shape != other.shape:
        shapes = [f"{rows} x {length} tokens" for rows, length in (ids.shape, other.shape)]
        raise DataError(
            f"clean and corrupted: {' and '.join(shapes)}; expected equal numbers of texts and tokens; choose texts of "
            "the same length in tokens"
        )
    made = as_metric(metric)
    return ids, other, made.bind(study, ids), made


def _places(
    study: Access, ids: Tensor, other: Tensor, at: str, by: str | Sequence[str] | None
) -> tuple[list[Place], tuple[Axis, ...]]:
    """Sites to patch, in the order of the result's values, and the axes of the result."""
    if at not in SITES:
        raise ConfigError(f"at: {at!r}; expected one of {', '.join(SITES)}")
    allowed = ("layer", "pos") if at in STREAM else ("layer", "head", "pos")
    given = listed(("pos" if at in STREAM else "head") if by is None else by)
    axes = ["layer", *(axis for axis in given if axis != "layer")]
    if len({*axes}) < len(axes) or not {*axes} <= {*allowed}:
        raise ConfigError(
            f"by: {by!r}; expected any of {', '.join(allowed[1:])} for {at} (the layer is always an axis)"
        )
    config = study.config
    heads = config.n_kv_head if at in ("k", "v") else config.n_head
    counts = {"layer": config.n_layer, "head": heads, "pos": ids.shape[1]}
    labels = {
        "layer": [str(layer) for layer in range(config.n_layer)],
        "head": [f"H{head}" for head in range(heads or 0)],
        "pos": _positions(study, ids, other),
    }
    places = []
    for indices in product(*(range(counts[axis] or 0) for axis in axes)):
        where: dict[str, Any] = {"head": None, "pos": None, **dict(zip(axes, indices, strict=True))}
        places.append(Place(**where))
    return places, tuple(Axis(axis, labels[axis]) for axis in axes)


def _positions(study: Access, ids: Tensor, other: Tensor) -> list[str]:
    """Labels of positions: the token, or both tokens where the texts differ; only numbers for several texts."""
    if len(ids) > 1:
        return [str(position) for position in range(ids.shape[1])]
    pairs = zip(study.tokens(ids), study.tokens(other), strict=True)
    return [f"{i} {one}" if one == two else f"{i} {one}|{two}" for i, (one, two) in enumerate(pairs)]


# Reference implementation: one full forward pass with an edit per site.


def _by_edits(study: Access, ids: Tensor, other: Tensor, bound: Bound, at: str, places: Sequence[Place]) -> Tensor:
    _, clean = study.run_with_cache(ids, at)
    axes = [{"kv_head": "head"}.get(axis, axis) for axis in clean.axes((at, 0))]
    values = []
    for place in places:
        where = tuple(getattr(place, axis, None) for axis in axes)
        index = tuple(slice(None) if one is None else one for one in where)
        value = clean[at, place.layer][index]

        def edit(activation: Tensor, site: Any, index: Any = index, value: Tensor = value) -> None:
            activation[index] = value

        with study.hooks({(at, place.layer): edit}):
            values.append(bound.of(study.logits(other)[:, bound.positions]))
    return torch.stack(values)


# Fast implementation: resume from the middle of the corrupted run.


def _by_resuming(study: Access, ids: Tensor, other: Tensor, bound: Bound, at: str, places: Sequence[Place]) -> Tensor:
    base = Base(study, other, SITES[at])
    _, clean = study.run_with_cache(ids, SITES[at])
    with study.running():
        layers = [_Layer(base, clean, at, layer) for layer in range(study.config.n_layer)]
        values = base.logits.new_empty(len(places))
        at_once: dict[int | None, list[int]] = {}  # one position at a time, to hold the changes of one position only
        for index, place in enumerate(places):
            at_once.setdefault(place.pos, []).append(index)
        for indices in at_once.values():
            changes = [layers[places[index].layer].change(places[index]) for index in indices]
            for batch, logits in base.resume(changes, bound.positions):
                values[[indices[index] for index in batch]] = bound.of(logits).to(values)
    return values


class _Layer:
    """Computes the stream of one block after patching a site in it."""

    def __init__(self, base: Base, clean: Activations, at: str, layer: int) -> None:
        self.base, self.clean, self.at, self.layer = base, clean, at, layer
        block = base.model.trunk.blocks[layer]
        assert isinstance(block, Block)
        self.attn, self.mid = block.attn, base.stream(layer, "mid")  # (B, T, C)
        self.weights = write_weights(base.model, layer)  # (H, D, C)
        own, its = base.seen, clean
        if at in ("attn_out", "mlp_out"):
            half = "mid" if at == "attn_out" else "post"
            self.value = base.stream(layer, half) + its[at, layer] - own[at, layer]
        elif at in STREAM:
            self.value = its[at, layer]
        elif at in ("z", "q", "pattern"):  # the z of each query is independent, so all can be computed together
            if at == "z":
                z = its["z", layer]
            elif at == "q":
                _, z = self._attend(its["q", layer], own["k", layer])
            else:
                z = torch.einsum("bhts,bshd->bthd", its["pattern", layer], self._for_queries(own["v", layer]))
            self.added = torch.einsum("bthd,hdc->bthc", z - own["z", layer], self.weights)
        elif at == "k":
            self.scores, _ = self._attend(own["q", layer], its["k", layer])  # (B, H, T, S)

    def change(self, place: Place) -> Change:
        """The change of the stream when this place is patched."""
        begin, end = (0, None) if place.pos is None else (place.pos, place.pos + 1)
        if self.at == "resid_pre":
            return Change(self.layer - 1, "post", begin, self.value[:, begin:end])
        if self.at in STREAM:
            half = "mid" if self.at in ("resid_mid", "attn_out") else "post"
            return Change(self.layer, half, begin, self.value[:, begin:end])  # type: ignore[arg-type]
        if self.at in ("k", "v"):  # affects all later queries
            return Change(self.layer, "mid", begin, self.mid[:, begin:] + self._seen_later(place, begin, end))
        added = self.added[:, begin:end]
        added = added.sum(2) if place.head is None else added[:, :, place.head]
        return Change(self.layer, "mid", begin, self.mid[:, begin:end] + added)

    def _seen_later(self, place: Place, begin: int, end: int | None) -> Tensor:
        """Change of the attention output from `begin` on, (B, n, C), with patched keys or values at begin .. end."""
        own, its, layer = self.base.seen, self.clean, self.layer
        group = self.attn.n_head // self.attn.n_kv_head
        heads = slice(None) if place.head is None else slice(place.head * group, (place.head + 1) * group)
        if self.at == "v":
            pattern = own["pattern", layer][:, heads, begin:, begin:end]
            values = self._for_queries(its["v", layer] - own["v", layer])[:, begin:end, heads]
            z = torch.einsum("bhts,bshd->bthd", pattern, values)
        else:
            scores = own["attn_scores", layer][:, heads, begin:].clone()
            scores[..., begin:end] = self.scores[:, heads, begin:, begin:end]
            values = self._for_queries(own["v", layer])[:, :, heads]
            z = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values) - own["z", layer][:, begin:, heads]
        return torch.einsum("bthd,hdc->btc", z, self.weights[heads])

    def _for_queries(self, kv: Tensor) -> Tensor:  # (B, S, G, D) -> (B, S, H, D)
        return kv.repeat_interleave(self.attn.n_head // self.attn.n_kv_head, 2)

    def _attend(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, H, T, S) and z (B, T, H, D) for given queries and keys, with the values of the corrupted run."""
        seen: dict[str, Tensor] = {}
        heads = torch.cat([q, k, self.base.seen["v", self.layer]], 2).transpose(1, 2)  # (B, H + 2G, T, D)
        step = causal_step(heads.shape[2], heads.device)
        explicit_attention(self.attn, heads, step, tap=lambda name, value: seen.setdefault(name, value))
        return seen["hook_attn_scores"], seen["hook_z"]
