"""The effect of an edit on the loss, the distribution and an answer; the metrics of all causal analyses.

A metric is one number computed from logits. An analysis first binds the metric to its texts. The bound metric lists the
positions that it needs, so that only their logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access, Edits
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text, need_two
from minigpt.model.precision import widen

Tokens = str | int | Sequence[str] | Sequence[int]
MEASURES = ("loss", "KL", "flips")


# Effects.


def changes(before: Tensor, after: Tensor, ids: Tensor) -> Tensor:
    """What a change did, (..., 3): the loss's change in nats per token, KL(before || after) in nats, and the share of
    positions whose most likely token changes.

    Args:
        before: logits (B, T, V).
        after: logits (..., B, T, V).
        ids: token ids (B, T).
    """
    need_two(ids.shape[1])
    then, now = widen(before).log_softmax(-1), widen(after).log_softmax(-1)
    following = ids[:, 1:, None]  # (B, T - 1, 1)
    cost = then[:, :-1].gather(-1, following) - now[..., :-1, :].gather(
        -1, following.expand(*now.shape[:-2], *following.shape[1:])
    )
    divergence = (then.exp() * (then - now)).sum(-1)  # (..., B, T)
    flips = (before.argmax(-1) != after.argmax(-1)).to(now.dtype)
    return torch.stack([cost.mean((-3, -2, -1)), divergence.mean((-2, -1)), flips.mean((-2, -1))], -1)


def effect(
    study: Access,
    text: Text,
    edits: Edits,
    *,
    answer: Tokens | None = None,
    versus: Tokens | None = None,
    position: int = -1,
) -> Result:
    """Measure what edits do to the model's output on a text.

    Args:
        study: see `Study`.
        text: one, or several of equal length.
        edits: as for `Study.hooks`.
        answer: a token whose logit is compared before and after too; one per row, or one for all.
        versus: another, whose logit is subtracted.
        position: where the answer is due: after this position.

    Returns:
        The change of loss (nats per token), KL(before || after) (nats), the fraction of positions whose most likely
        token changes, and the change of the answer's logit or of the difference of the two.
    """
    ids = study.ids(text)
    before = study.logits(ids)
    with study.hooks(edits):
        after = study.logits(ids)
    values, labels = changes(before, after, ids), list(MEASURES)
    if answer is not None:
        bound = logit_difference(answer, versus, position).bind(study, ids)
        values = torch.cat([values, (bound.of(after[:, bound.positions]) - bound.of(before[:, bound.positions]))[None]])
        labels.append("logit" if versus is None else "logit difference")
    axis = Axis("measure", labels)
    return Result("Effect of the edits", values.numpy(force=True), (axis,), "nats/token; nats; share; logits")


# Metrics.


class Bound(NamedTuple):
    """A metric bound to its texts."""

    positions: list[int]
    """The P positions whose logits it needs."""
    of: Callable[[Tensor], Tensor]
    """Maps logits at these positions (..., B, P, V) to the metric (...), averaged over B."""


@dataclass(frozen=True)
class Metric:
    """One number computed from logits; see `logit_difference`, `loss` and `kl`."""

    name: str
    unit: str
    bind: Callable[[Access, Tensor], Bound]
    """(study, ids (B, T) of the clean text) -> the bound metric."""


def logit_difference(answer: Tokens, versus: Tokens | None = None, position: int = -1) -> Metric:
    """Metric: logit of an answer at a position, minus that of `versus`; tokens as text or ids, one or one per row."""

    def bind(study: Access, clean: Tensor) -> Bound:
        rows, length = clean.shape
        signed = [(1, _each(study, answer, rows))]
        if versus is not None:
            signed.append((-1, _each(study, versus, rows)))

        def of(logits: Tensor) -> Tensor:  # (..., B, 1, V) -> (...)
            last = logits[..., 0, :]
            picked = [sign * last.gather(-1, ids.expand(*last.shape[:-1], 1)) for sign, ids in signed]
            return sum(picked[1:], picked[0]).mean((-2, -1))

        return Bound([_place(position, length)], of)

    tokens = f"{answer!r}" if versus is None else f"{answer!r} - {versus!r}"
    return Metric(f"logit {tokens}", "logits", bind)


def loss() -> Metric:
    """Metric: the mean loss on the clean text, in nats per token."""

    def bind(study: Access, clean: Tensor) -> Bound:
        need_two(clean.shape[1])
        following = clean[:, 1:]

        def of(logits: Tensor) -> Tensor:  # (..., B, T - 1, V) -> (...)
            costs = -widen(logits).log_softmax(-1).gather(-1, following[..., None].expand(*logits.shape[:-1], 1))
            return costs.mean((-3, -2, -1))

        return Bound(list(range(following.shape[1])), of)

    return Metric("loss", "nats", bind)


def kl(position: int | None = -1) -> Metric:
    """Metric: KL(clean || run) of the next-token distribution at a position; None: the mean over all positions."""

    def bind(study: Access, clean: Tensor) -> Bound:
        length = clean.shape[1]
        places = list(range(length)) if position is None else [_place(position, length)]
        reference = widen(study.logits(clean)[:, places]).log_softmax(-1)  # (B, P, V)

        def of(logits: Tensor) -> Tensor:  # (..., B, P, V) -> (...)
            return (
                F.kl_div(widen(logits).log_softmax(-1), reference, log_target=True, reduction="none")
                .sum(-1)
                .mean((-2, -1))
            )

        return Bound(places, of)

    return Metric("KL(clean || run)", "nats", bind)


def as_metric(metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """Return a Metric; a plain function of logits (B, T, V) is wrapped."""
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise ConfigError(f"metric: {metric!r}; expected logit_difference(...), loss(), kl() or a function of logits")

    def of(logits: Tensor) -> Tensor:
        each = logits.reshape(-1, *logits.shape[-3:])
        return torch.stack([torch.as_tensor(metric(one)) for one in each]).reshape(logits.shape[:-3])

    return Metric(
        getattr(metric, "__name__", "metric"), "", lambda study, clean: Bound(list(range(clean.shape[1])), of)
    )


def _each(study: Access, tokens: Tokens, rows: int) -> Tensor:  # (B, 1)
    each: list[Any] = [tokens] * rows if isinstance(tokens, str | int) else list(tokens)
    if len(each) != rows:
        raise ConfigError(f"answer: {len(each)} tokens for {rows} texts; give one, or one per text")
    return torch.tensor([study.token_id(token) for token in each], device=study.model.device)[:, None]


def _place(position: int, length: int) -> int:
    if not -length <= position < length:
        raise ConfigError(f"position: {position} is outside the text; expected {-length} .. {length - 1}")
    return position % length
