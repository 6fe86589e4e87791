"""The data of each view of the report: one function and one dict per view (see docs/study/page.md).

All data except the head scores comes from one forward pass over the text. Position t predicts token t + 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.linear import dividing, through
from minigpt.internals.attribution.decomposition import Point, parts_of, points, writers
from minigpt.internals.attribution.lens import Reader, lens_logits, statistic
from minigpt.internals.page.render import packed, packed_shares
from minigpt.model.precision import precise, widen
from minigpt.sampling.settings.config import FIELDS, SamplingConfig
from minigpt.sampling.settings.conflicts import switched_on
from minigpt.sampling.settings.orders import ORDERS, resolve

if TYPE_CHECKING:
    from minigpt.tokenizer.base import Tokenizer

TOP = 10  # tokens listed for a prediction
ONE_BY_ONE = 1024  # largest logits stored individually for the sampler view; the others are grouped
GROUPS = 64

# Fields of `SamplingConfig` that the sampler view can change, and settings that it assumes to be fixed.
SHOWN = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "smoothing_factor", "smoothing_curve"),
    *("temperature", "dynatemp_range", "dynatemp_exponent", "top_h", "top_k", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "top_a", "tail_free", "top_n_sigma", "p_less"),
)
PRESUMED = {"repetition_scope": "both", "repetition_normalised": False, "penalty_window": None, "exact_top_k": False}


def loss(logits: Tensor, ids: Tensor) -> dict[str, Any]:
    """Loss of each token except the first, and the top predictions for it, from logits (T, V) and ids (T)."""
    log_p = widen(logits[:-1]).log_softmax(-1)
    best = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1)
    return {
        "nats": packed(statistic("loss", log_p, log_p, ids[1:]), "f32"),
        "rank": packed(statistic("rank", log_p, log_p, ids[1:]), "u32"),
        "entropy": packed(statistic("entropy", log_p, log_p, ids[1:]), "f32"),
        "ids": packed(best.indices, "u32"),
        "p": packed_shares(best.values.exp(), "u16"),
    }


def attention(patterns: Tensor) -> dict[str, Any]:
    """Attention weights (L, H, T, T): the lower triangle of each head, row by row."""
    layers, heads, length, _ = patterns.shape
    rows, columns = torch.tril_indices(length, length)
    triangle = patterns[:, :, rows, columns].clamp(0, 1)
    return {"L": layers, "H": heads, "T": length, "weights": packed_shares(triangle, "u8")}


def lens(study: Access, ids: Tensor, reader: Reader | None = None) -> dict[str, Any]:
    """Lens predictions after every component, for ids (T); see `minigpt.internals.attribution.lens`."""
    where = points(study.config)
    [(_, logits)] = lens_logits(study, ids, where[-1:])
    output = widen(logits[0]).log_softmax(-1)  # (T, V)
    following = torch.cat((ids[1:], output[-1:].argmax(-1)))
    columns: dict[str, list[Tensor]] = {"ids": [], "p": [], "rank": [], "entropy": [], "kl": []}
    for _, logits in lens_logits(study, ids, where, reader):
        log_p = widen(logits[0]).log_softmax(-1)
        best = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1)
        columns["ids"].append(best.indices)
        columns["p"].append(best.values.exp())
        for stat in ("rank", "entropy", "kl"):
            columns[stat].append(statistic(stat, log_p, output, following).clamp(min=0))
    table = {name: torch.stack(parts) for name, parts in columns.items()}  # (rows, T) or (rows, T, TOP)
    wrote = {"resid_pre": "embed", "resid_mid": "L{} attn", "resid_post": "L{} mlp"}
    return {
        "rows": [wrote[point.kind].format(point.layer) for point in where],
        "target": following.tolist(),
        "ids": packed(table["ids"], "u32"),
        "p": packed_shares(table["p"], "u16"),
        "rank": packed(table["rank"], "u32"),
        **{name: packed(table[name], "f32") for name in ("entropy", "kl")},
    }


def attribution(study: Access, cache: Activations, logits: Tensor, ids: Tensor) -> dict[str, Any]:
    """Direct logit attribution of the next token and of its strongest rival, at every position.

    Equals `attribute_logit` at every position, but reuses one forward pass.
    """
    norm, unembed = dividing(study.model.trunk.norm, study.config, "logit attribution"), study.model.unembed
    answer = torch.cat((ids[1:], logits[-1:].argmax(-1)))
    rival = logits.scatter(1, answer[:, None], -torch.inf).argmax(-1)
    tokens = torch.stack((answer, rival))  # (2, T)
    scale = precise(cache["ln_final.hook_scale"][0])  # (T, 1)
    weight = 1.0 if norm.weight is None else precise(norm.weight)
    towards = precise(unembed.weight[tokens])  # (2, T, C)
    back = through(norm, towards)
    parts = parts_of(study, cache, "head", _end(study))
    labels = [label for part in parts for label in part.labels]
    each = [torch.einsum("trc,atc->atr", precise(part.written()[0]), back) for part in parts]
    values = torch.cat(each, -1) / scale  # (2, T, rows)
    bias = norm.bias
    if bias is not None:
        labels.append("final norm bias")
        values = torch.cat((values, (towards @ precise(bias))[..., None]), -1)
    hidden = precise(cache["ln_final.hook_normalized"][0]) * weight + (0.0 if bias is None else precise(bias))
    uncapped = (hidden * towards).sum(-1)  # (2, T)
    cap = study.config.logit_softcap
    return {
        "rows": labels,
        "answer": answer.tolist(),
        "versus": rival.tolist(),
        "values": packed(values, "f32"),  # (2, T, rows): for the answer and the rival
        "logit": packed(uncapped, "f32"),
        "residual": packed(uncapped - values.sum(-1), "f32"),
        "scale": packed(scale[:, 0], "f32"),
        "cap": cap or None,
        "capped": packed(logits.gather(1, tokens.T).T, "f32") if cap else None,
    }


def _end(study: Access) -> Point:
    return Point(study.config.n_layer - 1, "resid_post")


def next_token(study: Access, logits: Tensor, ids: Tensor) -> dict[str, Any]:
    """The logits (V) after the last token and the run's sampling settings; the page computes the rest."""
    config = SamplingConfig() if study.run is None else study.run.sampling
    tokenizer = tokenizer_of(study)
    size = logits.shape[-1] if tokenizer is None else min(logits.shape[-1], tokenizer.vocab_size)
    falling, order = widen(logits[:size]).cpu().sort(descending=True, stable=True)
    off = {name: FIELDS[name].metadata["off"] for name in SHOWN}
    given = {name: getattr(config, name) for name in SHOWN}
    others = [name for name in switched_on(config) if name not in SHOWN]
    others += [name for name, value in PRESUMED.items() if getattr(config, name) != value]
    orders = {name: list(known.steps) for name, known in ORDERS.items()}
    if not isinstance(config.order, str):
        orders["own"] = list(resolve(config.order).steps)
    return {
        "ids": packed(order[:ONE_BY_ONE], "u32"),
        "logits": packed(falling[:ONE_BY_ONE], "f32"),
        "groups": _grouped(falling[ONE_BY_ONE:].double()),
        "history": ids.tolist(),
        "params": {name: off[name] if value is None else value for name, value in given.items()},
        "off": {**off, "temperature": 1.0, "p_less": False},
        "order": config.order if isinstance(config.order, str) else "own",
        "orders": orders,
        "others": others,
    }


def tokenizer_of(study: Access) -> Tokenizer | None:
    """The study's tokenizer, or None if it has none."""
    try:
        return study.tokenizer
    except ConfigError:
        return None


def _grouped(falling: Tensor) -> list[list[float]]:
    """Group sorted logits into GROUPS equal intervals, as [count, logit] with the same total probability."""
    if not len(falling):
        return []
    high, low = float(falling[0]), float(falling[-1])
    step = (high - low) / GROUPS or 1.0
    place = ((high - falling) / step).long().clamp(max=GROUPS - 1)
    groups = []
    for group in place.unique().tolist():
        members = falling[place == group]
        groups.append([len(members), float(members.logsumexp(0)) - math.log(len(members))])
    return groups


def run_of(study: Access, ids: Tensor) -> tuple[Tensor, Activations]:
    """Run one forward pass over ids (T); return the logits (T, V) and the activations that the views need.

    Raises DataError if the logits are not finite.
    """
    end = _end(study)
    names = [*writers(study.config, "head", end), end.name, "pattern", "ln_final.*"]
    logits, cache = study.run_with_cache(ids[None], names)
    if not torch.isfinite(logits).all():
        raise DataError("model: its logits are not finite, so there is nothing to show; use another checkpoint")
    return logits[0], cache
