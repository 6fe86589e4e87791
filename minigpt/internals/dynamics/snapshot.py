"""Metrics of a model's internals at one step, cheap enough to repeat during training (see KINDS).

A series of snapshots shows when each behaviour is learned: `minigpt.internals.dynamics.series`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.internals.access.access import Access
from minigpt.internals.access.axes import head_labels
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text, need_two
from minigpt.internals.causal.ablation import ablate
from minigpt.internals.causal.effect import MEASURES
from minigpt.internals.causal.heads import LONGEST, heads
from minigpt.internals.dynamics.context import held_out, in_parts, score_of
from minigpt.model.precision import widen


class Kind(NamedTuple):
    """One kind of metric."""

    axis: str
    """Name of its axis: it has one value for each head, layer, ..."""
    title: str
    unit: str
    says: str
    """One sentence of explanation."""


KINDS = {
    "in_context": Kind(
        "loss", "In-context score", "nats", "Loss late in the context minus loss early; negative if context helps."
    ),
    "induction": Kind(
        "head",
        "Induction",
        "",
        "Attention to the token after the previous occurrence of the same token, in repeated random text.",
    ),
    "previous": Kind("head", "Previous token", "", "Attention to the previous token, in repeated random text."),
    "ablation": Kind("head", "Ablation", "nats", "Loss increase when the head is zero-ablated."),
    "entropy": Kind("head", "Attention entropy", "", "0: attention on one token, 1: uniform over all visible tokens."),
    "loss_by_position": Kind(
        "position", "Loss by position", "nats", "Loss of tokens with this many tokens before them."
    ),
    "stream": Kind("layer", "Size of the residual stream", "", "RMS after each block; embed: before the first block."),
    "weights": Kind("layer", "Weight norm", "", "Euclidean norm of the parameters of each block, and of the rest."),
}
ABLATED = 512  # tokens of the text used for the ablations
REPEATS = 8  # number of random sequences


def snapshot(study: Access, text: Text | None = None) -> dict[str, Result]:
    """Compute all metrics, by kind. Scores on repeated random blocks need room for blocks of two tokens.

    Args:
        study: the study of the model.
        text: rows of equal length; None: windows of the validation split of the run's corpus.
    """
    ids = study.ids(held_out(study) if text is None else text)
    need_two(ids.shape[1])
    repeated = repeats(ids)
    kinds = ("induction", "previous") if repeated.shape[1] >= 4 else ()
    scores = heads(study, repeated, kinds=kinds, causal=False).scores if kinds else {}
    without = ablate(study, ids[: max(1, ABLATED // ids.shape[1])], parts="head").values
    losses, entropy, stream = _on_text(study, ids)
    names, layers = head_labels(study.config), ["embed", *map(str, range(study.config.n_layer))]
    by_position, weights = in_doublings(losses), weight_norms(study)
    found: dict[str, tuple[list[str], Any]] = {
        "in_context": (["score"], [score_of(losses)["score"]]),
        **{kind: (names, scores[kind].values.flatten()) for kind in kinds},
        "ablation": (names, without[:, MEASURES.index("loss")]),
        "entropy": (names, entropy.flatten()),
        "loss_by_position": (list(by_position), list(by_position.values())),
        "stream": (layers, stream),
        "weights": (list(weights), list(weights.values())),
    }
    return {
        kind: Result(KINDS[kind].title, values, (Axis(KINDS[kind].axis, labels),), KINDS[kind].unit)
        for kind, (labels, values) in found.items()
    }


def numbers(figures: dict[str, Result]) -> dict[str, float]:
    """Flatten a snapshot to one row of metrics.jsonl: "internals/KIND/LABEL" -> value."""
    return {
        f"internals/{kind}/{label}": float(value)
        for kind, result in figures.items()
        for label, value in zip(result.axes[0].labels, result.values, strict=True)
    }


class _Means:
    """An edit function that accumulates the mean of a measure per site, so that no activation has to be kept."""

    def __init__(self, measure: Callable[[Tensor], Tensor]) -> None:
        self.measure, self.sums, self.rows = measure, defaultdict[str, Any](float), defaultdict[str, int](int)

    def __call__(self, activation: Tensor, site: Any) -> None:
        self.sums[site.name] += self.measure(widen(activation)).cpu().double() * len(activation)
        self.rows[site.name] += len(activation)

    def stack(self) -> Tensor:
        """Stack the means of all sites, in the order of their first call."""
        return torch.stack([total / self.rows[name] for name, total in self.sums.items()])


def _on_text(study: Access, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B, T - 1), attention entropy (L, H), and RMS of the stream (L + 1), for ids (B, T)."""
    entropy, stream = _Means(attention_entropy), _Means(lambda x: x.square().mean())
    with study.hooks({"pattern": entropy, ("resid_pre", 0): stream, "resid_post": stream}):
        losses = torch.cat([study.losses(part) for part in in_parts(study, ids)])
    return losses, entropy.stack(), stream.stack().sqrt()


def attention_entropy(pattern: Tensor) -> Tensor:  # (B, H, T, S = T) -> (H)
    """Entropy of the attention weights divided by the log of the number of visible slots, averaged over queries.

    The first query, which sees only itself, is left out.
    """
    entropy = torch.special.entr(pattern).sum(-1)[..., 1:]  # (B, H, T - 1)
    seen = torch.arange(2, pattern.shape[-1] + 1, device=pattern.device)
    return (entropy / seen.log()).mean((0, 2))


def repeats(ids: Tensor) -> Tensor:
    """Draw repeated random blocks, (8, 2 n), of distinct tokens that occur in ids (B, T).

    n is limited by T and by the number of tokens. Other tokens of the vocabulary may never have been trained.
    """
    known, generator = ids.unique(), torch.Generator().manual_seed(0)
    length = min(ids.shape[1] // 2, LONGEST, len(known))
    draws = [torch.randperm(len(known), generator=generator)[:length] for _ in range(REPEATS)]
    return known[torch.stack(draws).to(ids.device)].repeat(1, 2)


def in_doublings(losses: Tensor) -> dict[str, float]:
    """Average losses (B, T - 1) over positions 1, 2-3, 4-7, 8-15, ...: one value per doubling of the context."""
    found, first = {}, 1
    while first <= losses.shape[1]:
        last = min(2 * first - 1, losses.shape[1])
        found[str(first) if first == last else f"{first}-{last}"] = float(losses[:, first - 1 : last].mean())
        first = last + 1
    return found


def weight_norms(study: Access) -> dict[str, float]:
    """Euclidean norm of all parameters of each block, and of each module outside the blocks."""
    squares = defaultdict[str, float](float)
    for name, parameter in study.model.named_parameters():
        parts = name.split(".")
        norm = torch.linalg.vector_norm(widen(parameter.detach()))
        squares[parts[2] if parts[1] == "blocks" else parts[-2]] += float(norm) ** 2
    return {name: square**0.5 for name, square in squares.items()}
