"""Direct logit attribution: the exact contribution of each term of the residual stream, without folding weights.

The final norm divides by a scale s that depends on the whole stream. Given s, the logit of token t is linear in the
terms c of the stream:

    logit_t = sum over terms c of  ((c - mean(c)) / s) . (w * W_U[t])   +   b . W_U[t]      LayerNorm, weight w, bias b
    logit_t = sum over terms c of  (c / s) . (w * W_U[t])                                   RMSNorm

With s taken from the forward pass, the terms sum exactly to the logit; no weights are folded. This is the *direct*
effect: what later blocks compute from a term counts for those blocks. Logits are meant before the soft cap
(`logit_softcap`), which is not linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.linear import dividing, through
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.decomposition import By, one_text, parts_of, point_of, writers
from minigpt.model.precision import precise

NEURONS = 20  # default number of neurons with a row of their own


def attribute_logit(
    study: Access,
    text: Text,
    answer: str | int,
    versus: str | int | None = None,
    position: int | None = -1,
    by: By = "component",
    *,
    top: int | None = None,
) -> Result:
    """Compute what each term of the residual stream adds to a token's logit, or to a logit difference.

    Args:
        study: the study of the model.
        text: one text.
        answer: the token, as text or id.
        versus: a second token, whose logit is subtracted.
        position: position of the logit; None: all positions.
        by: layer, component, head or neuron (see `Study.components`).
        top: number of largest terms with a row of their own; one more row is the sum of the others. With by="neuron"
            it applies to neurons only. None: all terms, but 20 neurons.

    Returns:
        A result with the axis component and, with position=None, token. The rows sum to the logit; the last row is the
        bias of the final norm, if it has one. The notes hold the sum, the logit before the soft cap, their difference
        (remainder) and the scale of the final norm. With a soft cap they also hold the cap and the capped logit.

    Raises:
        ConfigError: invalid position, `by` or `top`.
        DataError: an answer that is not exactly one token, or several texts.
    """
    ids, tokens = one_text(study, text)
    if position is not None and not -len(tokens) <= position < len(tokens):
        raise ConfigError(f"position: {position} is outside the text; expected {-len(tokens)} .. {len(tokens) - 1}")
    if top is not None and top < 1:
        raise ConfigError(f"top: {top}; expected a positive number, or None for all terms")
    norm = dividing(study.model.trunk.norm, study.config, "logit attribution")
    end = point_of(study.config, ("resid_post", -1))
    names = [*writers(study.config, by, end), end.name, "ln_final.hook_scale", "ln_final.hook_normalized"]
    logits, cache = study.run_with_cache(ids, names, positions=None if position is None else [position])
    where = slice(None) if position is None else [position]
    with torch.no_grad():
        towards = _direction(study, answer, versus)
        scale = precise(cache["ln_final.hook_scale"][0])  # (T, 1)
        parts = parts_of(study, cache, by, end)
        values = torch.cat([part.along(through(norm, towards))[0] for part in parts], -1) / scale  # (T, n)
        labels = [label for part in parts for label in part.labels]
        if by == "neuron" or top is not None:
            many = [part.rows is not None or by != "neuron" for part in parts for _ in part.labels]
            values, labels = _largest(values, labels, many, top or NEURONS, f"other {by}s")
        bias = norm.bias
        if bias is not None:
            values = torch.cat((values, (precise(bias) @ towards).expand(len(values), 1)), -1)
            labels.append("final norm bias")
        logit = _logit(norm, precise(cache["ln_final.hook_normalized"][0]), towards)  # (T)
        after = _difference(study, precise(logits[0, where]), answer, versus)  # (T)
    title = f"direct logit attribution of {_named(study, answer, versus)}, by {by}"
    axis = Axis("component", labels)
    if position is None:
        notes: dict[str, Any] = {"remainder": float((values.sum(-1) - logit).abs().max())}
        if study.config.logit_softcap:
            notes["cap"] = study.config.logit_softcap
        return Result(title, values.T.numpy(), (axis, Axis("token", tokens)), "logits", notes)
    total = float(values.sum())
    notes = {
        "position": tokens[position],
        "sum": total,
        "logit": float(logit),
        "remainder": float(logit) - total,
        "scale": float(scale),
    }
    if study.config.logit_softcap:
        notes |= {"cap": study.config.logit_softcap, "after the cap": float(after)}
    return Result(title, values[0].numpy(), (axis,), "logits", notes)


def _direction(study: Access, answer: str | int, versus: str | int | None) -> Tensor:  # -> (C)
    """Vector whose dot product with the normed stream is the logit, or the logit difference."""
    rows = study.model.unembed.weight
    towards = precise(rows[study.token_id(answer)])
    return towards if versus is None else towards - precise(rows[study.token_id(versus)])


def _logit(norm: Any, normalized: Tensor, towards: Tensor) -> Tensor:  # (T, C), (C) -> (T)
    """Logit before the soft cap, computed from the model's normed stream."""
    hidden = normalized if norm.weight is None else normalized * precise(norm.weight)
    return (hidden if norm.bias is None else hidden + precise(norm.bias)) @ towards


def _difference(study: Access, logits: Tensor, answer: str | int, versus: str | int | None) -> Tensor:
    """The logit or logit difference from the model's logits (T, V), after the soft cap."""
    found = logits[:, study.token_id(answer)]
    return found if versus is None else found - logits[:, study.token_id(versus)]


def _named(study: Access, answer: str | int, versus: str | int | None) -> str:
    """Text of the tokens, for a title."""
    names = [repr(study.token(study.token_id(token))) for token in (answer, versus) if token is not None]
    return " - ".join(names)


def _largest(values: Tensor, labels: list[str], many: list[bool], top: int, others: str) -> tuple[Tensor, list[str]]:
    """Reduce the columns of (T, n): of those marked `many`, keep the `top` largest, in order, and sum up the others."""
    among = [i for i, one_of_many in enumerate(many) if one_of_many]
    if top >= len(among):
        return values, labels
    largest = {among[i] for i in values[:, among].abs().sum(0).topk(top).indices.tolist()}
    kept = [i for i in range(len(labels)) if i in largest or not many[i]]
    together = values[:, [i for i in among if i not in largest]].sum(-1, keepdim=True)
    return torch.cat((values[:, kept], together), -1), [*(labels[i] for i in kept), others]
