"""Path patching: along which connections a difference travels. Exact, including norms.

The model runs on a corrupted text. On one path from a sender (a head, an MLP, the embeddings) to a receiver (the
queries, keys or values of a head, an MLP, the logits), the receiver reads the corrupted stream with the sender's output
replaced by its output on the clean text. Parts between them are unchanged; parts after the receiver are recomputed.
(Wang et al. 2022, arXiv 2211.00593, appendix B.)

    sender     L0H1 (a head)   L0 attn (all heads of a layer)   L0 mlp   embed (input of the first block)
    receiver   L2H3.q (queries of a head), .k (keys), .v (values)   L2 mlp   logits

A tuple patches several parts together. Receivers that are patched together do not affect each other: each reads the
corrupted stream with the senders' outputs replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.axes import head_labels
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.causal.patching import AnyMetric, bind_pair
from minigpt.internals.causal.resume import TOKENS
from minigpt.model.precision import precise

Parts = str | tuple[str, ...]


class _Part(NamedTuple):
    """A sender or receiver."""

    when: int
    """Order of computation: attention of block l is 2l + 1, its MLP 2l + 2. A receiver reads all smaller numbers."""
    kind: str
    layer: int
    head: int


def patch_paths(
    study: Access,
    clean: Text,
    corrupted: Text,
    metric: AnyMetric,
    senders: Sequence[Parts] | None = None,
    receivers: Sequence[Parts] = ("logits",),
) -> Result:
    """Patch each connection from a sender to a receiver; return the change of the metric on the corrupted text.

    Args:
        study: see `Study`.
        clean: one text, or several of equal length.
        corrupted: the same number of texts of the same length.
        metric: see `patch`.
        senders: L0H1, L0 attn, L0 mlp, embed, or tuples of these; None: the embeddings, every head and every MLP.
        receivers: L2H3.q, L2H3.k, L2H3.v (k and v: of a key/value head), L2 mlp, logits, or tuples of these.

    Returns:
        The change of the metric: sender x receiver; NaN if no sender comes before any of the receivers. Patching all
        senders to all receivers gives the difference of the notes "clean" and "corrupted".

    Raises:
        ConfigError: invalid sender, receiver or metric.
        DataError: the texts have different numbers of tokens.
    """
    ids, other, bound, metric = bind_pair(study, clean, corrupted, metric)
    senders = every_sender(study) if senders is None else senders
    sending = [[_sender(study, name) for name in _group(group)] for group in senders]
    receiving = [[_receiver(study, name) for name in _group(group)] for group in receivers]
    names: list[str | tuple[str, int]] = ["result", "attn_out", "mlp_out", ("resid_pre", 0)]
    streams: list[str | tuple[str, int]] = ["resid_pre", "resid_mid", ("resid_post", -1)]
    _, there = study.run_with_cache(ids, names)
    without, here = study.run_with_cache(other, [*names, *streams])
    begin = bound.of(without[:, bound.positions])

    def exchanged(part: _Part) -> Tensor:  # (B, T, C): the sender's output on the clean minus the corrupted text
        if part.kind == "head":
            return (there["result", part.layer] - here["result", part.layer])[:, :, part.head]
        name = {"embed": "resid_pre", "attn": "attn_out", "mlp": "mlp_out"}[part.kind]
        return there[name, part.layer] - here[name, part.layer]

    values = torch.full((len(senders), len(receivers)), torch.nan, dtype=torch.float64)
    batch = max(1, TOKENS // other.numel())
    for column, group in enumerate(receiving):
        heard = [row for row, parts in enumerate(sending) if any(a.when < b.when for a in parts for b in group)]
        for some in (heard[first : first + batch] for first in range(0, len(heard), batch)):
            edits: dict[Any, Any] = {}
            for reader in group:
                name, stream = _reads(study, reader)
                nothing = torch.zeros_like(here[stream])
                added = torch.stack(
                    [
                        sum((exchanged(part) for part in sending[row] if part.when < reader.when), nothing)
                        for row in some
                    ]
                )
                read = (here[stream] + added).flatten(0, 1)  # (n B, T, C)
                edits[name] = _reading(read, reader.head, edits.get(name))
            with study.hooks(edits):
                logits = study.logits(other.repeat(len(some), 1))[:, bound.positions]
            values[some, column] = precise(bound.of(logits.unflatten(0, (len(some), -1))) - begin)
    axes = (
        Axis("sender", [_name(group) for group in senders]),
        Axis("receiver", [_name(group) for group in receivers]),
    )
    notes = {"clean": float(bound.of(study.logits(ids)[:, bound.positions])), "corrupted": float(begin)}
    return Result(f"Change of {metric.name} along paths", values.numpy(), axes, metric.unit, notes)


def every_sender(study: Access) -> list[str]:
    """Names of all senders: the embeddings, every head and every MLP."""
    return ["embed", *head_labels(study.config), *(f"L{layer} mlp" for layer in range(study.config.n_layer))]


def every_receiver(study: Access) -> list[str]:
    """Names of all receivers: queries, keys and values of every head, every MLP, and the logits."""
    config = study.config
    counts = {"q": config.n_head, "k": config.n_kv_head or 0, "v": config.n_kv_head or 0}
    found = []
    for layer in range(config.n_layer):
        found += [f"L{layer}H{head}.{letter}" for letter, count in counts.items() for head in range(count)]
        found.append(f"L{layer} mlp")
    return [*found, "logits"]


def _reads(study: Access, reader: _Part) -> tuple[tuple[str, int], tuple[str, int]]:
    """The activation that only this receiver reads, and the stream that it is a copy of."""
    if reader.kind == "logits":
        return ("resid_post", -1), ("resid_post", -1)
    if reader.kind == "mlp":
        return ("mlp_in", reader.layer), ("resid_mid", reader.layer)
    return (f"{reader.kind}_input", reader.layer), ("resid_pre", reader.layer)


def _reading(read: Tensor, head: int, before: Any) -> Any:
    """Create an edit that makes a receiver (one head or all) read `read`; first applies an edit of other heads."""

    def edit(activation: Tensor, site: Any) -> Tensor:
        if before is not None:
            activation = before(activation, site)
        if "kv_head" in site.axes or "head" in site.axes:
            activation[:, :, head] = read
            return activation
        return read

    return edit


def _group(names: Parts) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _name(names: Parts) -> str:
    return " + ".join(_group(names))


def _sender(study: Access, name: str) -> _Part:
    if name == "embed":
        return _Part(0, "embed", 0, 0)
    found = re.fullmatch(r"L(\d+)(?:H(\d+)| (attn|mlp))", name)
    if found and int(found[1]) < study.config.n_layer and int(found[2] or 0) < study.config.n_head:
        layer = int(found[1])
        return _Part(2 * layer + (2 if found[3] == "mlp" else 1), found[3] or "head", layer, int(found[2] or 0))
    raise ConfigError(
        f"sender {name!r}: this model has no such sender; expected embed, L0H0 to L{study.config.n_layer - 1}H"
        f"{study.config.n_head - 1}, or L0 attn, L0 mlp and so on"
    )


def _receiver(study: Access, name: str) -> _Part:
    config = study.config
    if name == "logits":
        return _Part(2 * config.n_layer + 1, "logits", -1, 0)
    found = re.fullmatch(r"L(\d+)(?:H(\d+)\.([qkv])| mlp)", name)
    if found and int(found[1]) < config.n_layer:
        layer, letter, head = int(found[1]), found[3] or "mlp", int(found[2] or 0)
        if head < ((config.n_kv_head or 0) if letter in "kv" else config.n_head):
            return _Part(2 * layer + (2 if letter == "mlp" else 1), letter, layer, head)
    raise ConfigError(
        f"receiver {name!r}: this model has no such receiver; expected L0H0.q, .k or .v and so on (query heads 0 to "
        f"{config.n_head - 1}, key/value heads 0 to {(config.n_kv_head or 1) - 1}), L0 mlp, or logits"
    )
