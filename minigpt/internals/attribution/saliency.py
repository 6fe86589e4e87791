"""Saliency: which tokens a prediction depends on, by gradients or occlusion.

x_t is the embedding of token t, x'_t a baseline for it, and f the answer's logit (or logit difference):

    gradient               |df/dx_t|                                     sensitivity of f to the token
    gradient_x_input       (x_t - x'_t) . df/dx_t                        first-order effect of the token
    integrated_gradients   (x_t - x'_t) . mean of df/dx_t from x' to x   along a straight path; sums to f(x) - f(x')
    occlusion              f(x) - f(x with x'_t)                         effect of replacing this token only

In models with n-gram embeddings, x_t includes the embeddings of the n-grams that end at the token. Position embeddings
are not part of x_t and do not change.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.decomposition import one_text, precise

Method = Literal["gradient", "gradient_x_input", "integrated_gradients", "occlusion"]
AT_ONCE = 2**12  # tokens per forward, about
MOST_STEPS = 1024
COMPLETE = 0.01  # tolerance of the sum of integrated gradients, relative to f(x) - f(x')
GRADING = 2  # see _way


def saliency(
    study: Access,
    text: Text,
    answer: str | int,
    versus: str | int | None = None,
    position: int = -1,
    *,
    method: Method = "integrated_gradients",
    baseline: Literal["mean", "zero"] | Text = "mean",
) -> Result:
    """Compute how much each token contributes to the logit of an answer, or to a logit difference.

    Args:
        study: the study of the model.
        text: one text.
        answer: the token, as text or id.
        versus: a second token, whose logit is subtracted.
        position: position of the logit.
        method: see the module docstring.
        baseline: replacement for a token: the mean embedding of the vocabulary, zero, or the tokens of another text of
            equal length. In models without position embeddings, norms are discontinuous at a zero stream: gradients
            near it are huge, and integrated gradients may not converge. Use the mean there.

    Returns:
        A result with the axis token; tokens after the position are 0. The notes hold f(x) ("value") and, except for
        the gradient method, f(x') ("baseline"), the sum of the scores, and value - baseline - sum ("remainder"). For
        integrated gradients they also hold the number of steps, which doubles until the remainder is within 1 % or
        there are 1024 steps.

    Raises:
        ConfigError: invalid method, baseline or position.
        DataError: an answer that is not exactly one token, several texts, or a baseline of another length.
    """
    if method not in get_args(Method):
        raise ConfigError(f"method: {method!r} is not one of {', '.join(get_args(Method))}")
    ids, tokens = one_text(study, text)
    if not -len(tokens) <= position < len(tokens):
        raise ConfigError(f"position: {position} is outside the text; expected {-len(tokens)} .. {len(tokens) - 1}")
    position %= len(tokens)
    asked = _Asked(study, ids, position, study.token_id(answer), None if versus is None else study.token_id(versus))
    own, other = _inputs(study, ids), _baseline(study, ids, baseline)  # (T, C) each
    value = asked.values(own[None])[0]
    notes: dict[str, Any] = {"position": tokens[position], "value": float(value)}
    if method == "gradient":
        scores = asked.gradients(own[None])[0].norm(dim=-1)
    else:
        base = asked.values(other[None])[0]
        notes["baseline"] = float(base)
        if method == "integrated_gradients":
            scores, notes["steps"] = _integrated(asked, own, other, float(value - base))
        elif method == "gradient_x_input":
            scores = (asked.gradients(own[None])[0] * precise(own - other)).sum(-1)
        else:
            gone = torch.eye(len(tokens), dtype=torch.bool, device=own.device)[: position + 1, :, None]
            without = [asked.values(torch.where(rows, other, own)) for rows in gone.split(asked.at_once)]
            scores = torch.zeros(len(tokens), dtype=value.dtype)
            scores[: position + 1] = value - torch.cat(without)  # row t has token t replaced
        notes |= {"sum": float(scores.sum()), "remainder": float(value - base - scores.sum())}
    names = [repr(study.token(study.token_id(token))) for token in (answer, versus) if token is not None]
    title = f"{method.replace('_', ' ')} of {' - '.join(names)}"
    unit = "logits per unit length" if method == "gradient" else "logits"
    return Result(title, scores.numpy(), (Axis("token", tokens),), unit, notes)


class _Asked:
    """The logit (difference) to explain, as a function of the token embeddings."""

    def __init__(self, study: Access, ids: Tensor, position: int, answer: int, versus: int | None) -> None:
        self.study, self.ids, self.position, self.answer, self.versus = study, ids, position, answer, versus
        self.at_once = max(1, AT_ONCE // ids.shape[1])

    def of(self, inputs: Tensor) -> Tensor:  # (n, T, C) -> (n)
        """Compute f for each row of inputs, in one forward pass."""
        study, ids = self.study, self.ids.expand(len(inputs), -1)
        edits: dict[Any, Any] = {name: 0.0 for name in _terms(study)}
        with study.hooks({**edits, "hook_embed": lambda embed, site: inputs}):
            hidden = study.forward(ids)[:, self.position]
        logits = study.model.unembed(hidden)
        found = logits[:, self.answer]
        return found if self.versus is None else found - logits[:, self.versus]

    def values(self, inputs: Tensor) -> Tensor:  # (n, T, C) -> (n)
        with self.study.running():
            return precise(self.of(inputs))

    def gradients(self, inputs: Tensor) -> Tensor:  # (n, T, C) -> (n, T, C)
        """Gradient of f for each row with respect to that row."""
        with self.study.running(grad=True):
            inputs = inputs.detach().requires_grad_()
            return precise(torch.autograd.grad(self.of(inputs).sum(), inputs)[0])


def _terms(study: Access) -> list[str]:
    """Full names of the token and n-gram embedding activations."""
    return [name for name in study.table if name.endswith("embed") and not name.endswith("pos_embed")]


def _inputs(study: Access, ids: Tensor) -> Tensor:  # (1, T) -> (T, C)
    _, cache = study.run_with_cache(ids, _terms(study), stop=True)
    return torch.stack([cache[name][0] for name in _terms(study)]).sum(0)


def _baseline(study: Access, ids: Tensor, baseline: Any) -> Tensor:  # -> (T, C)
    trunk, length = study.model.trunk, ids.shape[1]
    if isinstance(baseline, str) and baseline in ("mean", "zero"):
        tables = [table for table in (trunk.embed, trunk.bigram, trunk.trigram) if table is not None]
        mean = torch.stack([table.weight.detach().mean(0) for table in tables]).sum(0)
        return (mean if baseline == "mean" else torch.zeros_like(mean)).expand(length, -1)
    other, _ = one_text(study, baseline)
    if other.shape[1] != length:
        raise DataError(f"baseline: {other.shape[1]} tokens, but the text has {length}; give a text of equal length")
    return _inputs(study, other)


def _integrated(asked: _Asked, own: Tensor, other: Tensor, change: float) -> tuple[Tensor, int]:
    """Integrated gradients (T) and the number of steps (Sundararajan, Taly, Yan 2017, arXiv 1703.01365)."""
    difference, steps = precise(own - other), 16
    while True:
        along, weights = _way(steps)
        mean = torch.zeros_like(difference)
        for places, shares in zip(along.split(asked.at_once), weights.split(asked.at_once), strict=True):
            inputs = other + places.to(own)[:, None, None] * (own - other)  # (n, T, C)
            mean += torch.einsum("n,ntc->tc", shares, asked.gradients(inputs))
        scores = (mean * difference).sum(-1)
        if abs(float(scores.sum()) - change) <= COMPLETE / 2 * abs(change) or steps == MOST_STEPS:
            return scores, steps
        steps *= 2


def _way(steps: int) -> tuple[Tensor, Tensor]:
    """Points on the path from 0 to 1 at which gradients are computed, and their weights, (steps) each.

    The midpoint rule in u, with path parameter u**GRADING. Steps are smaller near the baseline: the stream is short
    there, so its direction after the norms, and with it the gradients, change fast.
    """
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    weights = GRADING * u ** (GRADING - 1)
    return u**GRADING, weights / math.fsum(weights.tolist())
