"""Direct logit attribution: the exact contribution of each term of the residual stream, without folding weights.

The last norm divides by a scale s that the whole stream decides, and the logit of token t is linear in what is left:

    logit_t = sum over terms c of  ((c - mean(c)) / s) . (w * W_U[t])   +   b . W_U[t]      LayerNorm, weight w, bias b
    logit_t = sum over terms c of  (c / s) . (w * W_U[t])                                   RMSNorm

So with s taken from the run, the rows sum to the logit. What is attributed is the *direct* effect: a term's way through
later blocks counts for those. A logit is meant before any cap on it (`logit_softcap`), which is not linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.decomposition import By, one_text, parts_of, point_of, precise, writers
from minigpt.model.layers import LayerNorm

NEURONS = 20  # that have a row of their own where nothing else is asked for


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
    """What each term of the stream adds to the logit of a token, or to the difference of two.

    Args:
        study: of the model.
        text: one text.
        answer: the token, as text or id.
        versus: another, whose logit is subtracted.
        position: after which token; None: after each.
        by: layer, component, head or neuron (see `Study.components`).
        top: only so many terms, the largest, have a row, and one more is the sum of the others; by neuron this is said
            of neurons. None: all, but 20 neurons.

    Returns:
        Axis component and, for every position, token. The rows sum to the logit; the last is the final norm's bias,
        where it has one. The notes hold the sum, the logit before any cap, the remainder between them, the scale of the
        final norm, and where there is a cap, the cap and what the model's own logits say after it.

    Raises:
        ConfigError: a position or unit that there is not.
        DataError: a word that is not one token, or several texts.
    """
    ids, tokens = one_text(study, text)
    if position is not None and not -len(tokens) <= position < len(tokens):
        raise ConfigError(f"position: {position} is none of the text's {len(tokens)}, counted from 0 or from -1 back")
    if top is not None and top < 1:
        raise ConfigError(f"top: {top}; expected a positive number, or None for all")
    end = point_of(study.config, ("resid_post", -1))
    names = [*writers(study.config, by, end), end.name, "ln_final.hook_scale", "ln_final.hook_normalized"]
    logits, cache = study.run_with_cache(ids, names, positions=None if position is None else [position])
    where = slice(None) if position is None else [position]
    with torch.no_grad():
        towards = _direction(study, answer, versus)
        scale = precise(cache["ln_final.hook_scale"][0])  # (T, 1)
        parts = parts_of(study, cache, by, end)
        values = torch.cat([part.along(_through_norm(study, towards))[0] for part in parts], -1) / scale  # (T, n)
        labels = [label for part in parts for label in part.labels]
        if by == "neuron" or top is not None:
            many = [part.rows is not None or by != "neuron" for part in parts for _ in part.labels]
            values, labels = _largest(values, labels, many, top or NEURONS, f"other {by}s")
        bias = getattr(study.model.trunk.norm, "bias", None)
        if bias is not None:
            values = torch.cat((values, (precise(bias) @ towards).expand(len(values), 1)), -1)
            labels.append("final norm bias")
        logit = _logit(study, precise(cache["ln_final.hook_normalized"][0]), towards)  # (T)
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
    """What the normed stream is multiplied with to give the logit, or the difference."""
    rows = study.model.unembed.weight
    towards = precise(rows[study.token_id(answer)])
    return towards if versus is None else towards - precise(rows[study.token_id(versus)])


def _through_norm(study: Access, towards: Tensor) -> Tensor:  # (C) -> (C)
    """The same for the stream before the norm, up to its scale: (c - mean c) . d is c . (d - mean d)."""
    norm = study.model.trunk.norm
    if norm.weight is not None:
        towards = towards * precise(norm.weight)
    return towards - towards.mean() if isinstance(norm, LayerNorm) else towards


def _logit(study: Access, normalized: Tensor, towards: Tensor) -> Tensor:  # (T, C), (C) -> (T)
    """The logit before any cap, from the model's own normed stream."""
    norm = study.model.trunk.norm
    hidden = normalized if norm.weight is None else normalized * precise(norm.weight)
    bias = getattr(norm, "bias", None)
    return (hidden if bias is None else hidden + precise(bias)) @ towards


def _difference(study: Access, logits: Tensor, answer: str | int, versus: str | int | None) -> Tensor:
    """The same number of the model's logits (T, V), after the cap."""
    found = logits[:, study.token_id(answer)]
    return found if versus is None else found - logits[:, study.token_id(versus)]


def _named(study: Access, answer: str | int, versus: str | int | None) -> str:
    """The tokens in words, for a title."""
    names = [repr(study.token(study.token_id(token))) for token in (answer, versus) if token is not None]
    return " - ".join(names)


def _largest(values: Tensor, labels: list[str], many: list[bool], top: int, others: str) -> tuple[Tensor, list[str]]:
    """The columns of (T, n), but of the `many` only the largest, in their order, and one for the sum of the rest."""
    among = [i for i, one_of_many in enumerate(many) if one_of_many]
    if top >= len(among):
        return values, labels
    largest = {among[i] for i in values[:, among].abs().sum(0).topk(top).indices.tolist()}
    kept = [i for i in range(len(labels)) if i in largest or not many[i]]
    together = values[:, [i for i in among if i not in largest]].sum(-1, keepdim=True)
    return torch.cat((values[:, kept], together), -1), [*(labels[i] for i in kept), others]
