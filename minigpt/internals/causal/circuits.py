"""Circuits: find and evaluate the few connections that carry a behaviour.

    input -> L0H1 -> L1H0.k -> L1H0 -> output

The residual stream is a sum, so each part reads each earlier part through a separate connection. Cutting a connection
means that its receiver reads the sender's output on the corrupted text; all other receivers still read the output on
the clean text. A circuit is the set of connections that are kept; all others are cut. m is the metric:

    faithfulness    (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)); 1 is best
    completeness    the same ratio with the circuit cut and all other connections kept; 0 is best
    minimality      smallest change of faithfulness when one connection of the circuit is cut

Leaving out a part that works against the behaviour makes faithfulness larger than 1, so the search uses the distance
of faithfulness from 1.

All connections are first ranked by a linear estimate from two forward passes and one backward pass (Syed et al. 2023,
arXiv 2310.10348): (sender on the corrupted text - sender) . d m / d receiver. The smallest set of top-ranked
connections that is faithful enough is then pruned exactly, one connection at a time, lowest rank first (Conmy et al.
2023, arXiv 2304.14997).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.durable import to_json, write_text
from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access, Edit, Site
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.result import Axis, Result, Tabled
from minigpt.internals.access.text import Text
from minigpt.internals.causal.effect import Bound, Metric, as_metric


class Connection(NamedTuple):
    """A connection from the output of one part to the input of another."""

    sender: str
    """input (all embeddings), a head such as L0H1, or L0 mlp."""
    receiver: str
    """Queries, keys or values of a head, such as L1H0.q (with grouped heads: L1G0.k and L1G0.v); L1 mlp; output."""


@dataclass
class Circuit(Tabled):
    """A circuit: its connections and its quality measures."""

    metric: str
    connections: list[Connection]
    """Sorted by the linear estimate, strongest first."""
    estimates: list[float]
    """Linear estimate of the change of the metric when only this connection is cut."""
    effects: list[float]
    """Faithfulness lost when this connection is cut ("worth"); negative if it works against the behaviour."""
    faithfulness: float
    completeness: float
    minimality: float
    clean: float
    """Metric on the clean text."""
    corrupted: float
    """Metric on the corrupted text."""
    total: int
    """Number of connections in the model."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to a graph with JSON types."""
        figures = {name: getattr(self, name) for name in (*FIGURES, "clean", "corrupted", "metric", "total")}
        rows = zip(self.connections, self.estimates, self.effects, strict=True)
        edges = [{"from": c.sender, "to": c.receiver, "estimate": e, "effect": f} for c, e, f in rows]
        return {**figures, "nodes": sorted({end for c in self.connections for end in c}), "edges": edges}

    def table(self) -> Result:
        """Connections x (estimated change of the metric, faithfulness lost when cut)."""
        labels = [f"{c.sender} -> {c.receiver}" for c in self.connections]
        values = np.stack([self.estimates, self.effects], 1).reshape(len(labels), 2)
        notes = {name: getattr(self, name) for name in (*FIGURES, "clean", "corrupted")}
        axes = (Axis("connection", labels), Axis("figure", ["estimate", "worth"]))
        return Result(f"Circuit for {self.metric}", values, axes, "", notes)

    def save(self, path: str | Path) -> Path:
        """Write the graph as .json, or the table as .csv, .npz or .html."""
        path = Path(path)
        if path.suffix != ".json":
            return super().save(path)
        write_text(path, to_json(self.to_dict()))
        return path

    def __str__(self) -> str:
        head = f"circuit for {self.metric}: {len(self.connections)} of {self.total} connections"
        rows = zip(self.connections, self.estimates, self.effects, strict=True)
        lines = [f"  {c.sender:8} -> {c.receiver:8}  estimate {e:+.4f}  worth {f:+.4f}" for c, e, f in rows]
        told = "  ".join(f"{name} {getattr(self, name):.4f}" for name in FIGURES)
        return "\n".join([head, *lines, f"{told}  clean {self.clean:.4g}  corrupted {self.corrupted:.4g}"])

    __repr__ = __str__


FIGURES = ("faithfulness", "completeness", "minimality")


class Wiring:
    """All connections of a model for one pair of texts; runs forward passes with some of them cut.

    Args:
        study: the study of the model.
        clean: ids (B, T) of the clean texts.
        corrupted: ids (B, T) of the corrupted texts.
        metric: metric bound to the clean text.
    """

    def __init__(self, study: Access, clean: Tensor, corrupted: Tensor, metric: Bound) -> None:
        self.study, self.clean, self.metric = study, clean, metric
        config = study.config
        heads, groups = config.n_head, config.n_kv_head or config.n_head
        part = "H" if groups == config.n_head else "G"
        self.senders = ["input"]
        self.receivers: dict[str, list[str]] = {}  # by name of the activation that they read, in its order
        for layer in range(config.n_layer):
            at = f"blocks.{layer}."
            self.receivers[f"{at}hook_q_input"] = [f"L{layer}H{head}.q" for head in range(heads)]
            for letter in "kv":
                names = [f"L{layer}{part}{group}.{letter}" for group in range(groups)]
                self.receivers[f"{at}hook_{letter}_input"] = names
            self.senders += [f"L{layer}H{head}" for head in range(heads)]
            self.receivers[f"{at}hook_mlp_in"] = [f"L{layer} mlp"]
            self.senders.append(f"L{layer} mlp")
        self.receivers[f"blocks.{config.n_layer - 1}.hook_resid_post"] = ["output"]
        shared = heads // groups
        self.parts: dict[str, list[str]] = {}  # senders that each receiver is an input of
        for receiver in (receiver for receivers in self.receivers.values() for receiver in receivers):
            layer_part, _, group = receiver.partition(".")[0].partition("G")
            members = [f"{layer_part}H{int(group) * shared + i}" for i in range(shared)] if group else [layer_part]
            self.parts[receiver] = members
        self.writes = ["blocks.0.hook_resid_pre"]
        for layer in range(config.n_layer):
            self.writes += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"]
        _, cache = study.run_with_cache(corrupted, self.writes)
        self.corrupted = self._stack(cache)  # (S, B, T, C)
        self.reach = {name: self._senders_before(name) for name in self.receivers}

    def _senders_before(self, name: str) -> int:
        """Number of senders that come before a receiver, in the order of computation."""
        per_layer = self.study.config.n_head + 1
        layer = int(name.split(".")[1])
        within = {"hook_mlp_in": per_layer - 1, "hook_resid_post": per_layer}
        return 1 + layer * per_layer + within.get(name.split(".")[2], 0)

    def _stack(self, cache: Activations) -> Tensor:  # (S, B, T, C)
        parts: list[Tensor] = []
        for name in self.writes:
            parts += cache[name].unbind(2) if name.endswith("result") else [cache[name]]
        return torch.stack(parts)

    def all(self) -> list[Connection]:
        """List all connections."""
        return [
            Connection(sender, receiver)
            for name, receivers in self.receivers.items()
            for receiver in receivers
            for sender in self.senders[: self.reach[name]]
        ]

    def run(self, cut: Iterable[Connection] | dict[Connection, float]) -> float:
        """Compute the metric with these connections cut; a number from 0 to 1 cuts a connection partly."""
        shares = cut if isinstance(cut, dict) else dict.fromkeys(cut, 1.0)
        written: list[Tensor] = []  # outputs of the senders in this forward pass, in order

        def record(activation: Tensor, site: Site) -> None:
            written.extend(activation.unbind(2) if site.name.endswith("result") else [activation])

        def reader(name: str) -> Edit:
            rows = self.receivers[name]
            weights = torch.zeros(len(rows), self.reach[name], device=self.clean.device)
            for row, receiver in enumerate(rows):
                for column, sender in enumerate(self.senders[: self.reach[name]]):
                    weights[row, column] = shares.get(Connection(sender, receiver), 0.0)

            def read(activation: Tensor, site: Site) -> Tensor:
                if not bool(weights.any()):
                    return activation
                moved = self.corrupted[: self.reach[name]] - torch.stack(written[: self.reach[name]])
                by_row = torch.einsum("rs,sbtc->btrc", weights.to(moved), moved)
                return activation + (by_row if activation.dim() == 4 else by_row[:, :, 0])

            return read

        # The order of edits matters: the first block's input is recorded before it is read, and the final stream is
        # edited after all senders have been recorded.
        edits: dict[str, Edit] = dict.fromkeys(self.writes, record)
        edits |= {name: reader(name) for name in self.receivers}
        with self.study.hooks(edits):
            logits = self.study.logits(self.clean)
        return float(self.metric.of(logits[:, self.metric.positions]))

    def estimates(self) -> dict[Connection, float]:
        """First-order estimate of the change of the metric when a single connection is cut, for each connection."""
        names = [*self.writes, *self.receivers]

        def metric(logits: Tensor) -> Tensor:
            return self.metric.of(logits[:, self.metric.positions])

        _, cache, gradients = self.study.gradients(self.clean, metric, names)
        moved = self.corrupted - self._stack(cache)  # (S, B, T, C)
        found: dict[Connection, float] = {}
        for name, receivers in self.receivers.items():
            gradient = gradients[name] if gradients[name].dim() == 4 else gradients[name][:, :, None]
            scores = torch.einsum("sbtc,btrc->rs", moved[: self.reach[name]], gradient).tolist()
            for receiver, row in zip(receivers, scores, strict=True):
                for sender, score in zip(self.senders, row, strict=False):
                    found[Connection(sender, receiver)] = score
        return found


def find_circuit(
    study: Access,
    clean: Text,
    corrupted: Text,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    faithfulness: float = 0.9,
    worth: float = 0.01,
) -> Circuit:
    """Find a small set of connections that explains the difference of a metric between two texts.

    Args:
        study: the study of the model.
        clean: a text on which the model shows the behaviour, or several of equal length.
        corrupted: the same number of texts of the same length, on which it does not.
        metric: measure of the behaviour: a metric from `minigpt.internals.causal.effect`, such as
            `logit_difference(answer, versus)`, or a function of logits (B, T, V).
        faithfulness: required faithfulness: 0.9 allows 0.9 to 1.1.
        worth: prune a connection if cutting it moves faithfulness away from 1 by less than this.

    Raises:
        DataError: the texts have different numbers of tokens, or the metric is the same on both.
        ConfigError: `faithfulness` or `worth` is outside 0 to 1, or edits are active.
    """
    if not 0 < faithfulness <= 1 or not 0 <= worth < 1:
        raise ConfigError(f"faithfulness {faithfulness}, worth {worth}: expected numbers from 0 to 1")
    if study.watch().edits:
        raise ConfigError(
            "find_circuit: called inside `with study.hooks(...)`, whose edits it ignores; call it outside"
        )
    ids, other = study.ids(clean), study.ids(corrupted)
    if ids.shape != other.shape:
        raise DataError(f"texts of {tuple(ids.shape)} and {tuple(other.shape)} tokens: expected equal shapes")
    measure = as_metric(metric)
    wiring = Wiring(study, ids, other, measure.bind(study, ids))
    everything = wiring.all()
    high, low = wiring.run(()), wiring.run(everything)
    if abs(high - low) < 1e-6 * max(1.0, abs(high)):
        raise DataError(f"{measure.name}: {high:.6g} on both texts; choose texts on which the metric differs")

    def left(kept: Iterable[Connection]) -> float:
        kept = set(kept)
        return (wiring.run([c for c in everything if c not in kept]) - low) / (high - low)

    def off(kept: Iterable[Connection]) -> float:
        return abs(1 - left(kept))

    estimates, allowed = wiring.estimates(), 1 - faithfulness
    ranked = sorted(everything, key=lambda connection: -abs(estimates[connection]))
    kept = _fewest(ranked, wiring.parts, lambda some: off(some) <= allowed)
    pruning = True
    while pruning:
        pruning, now = False, off(kept)
        for connection in reversed(kept):
            if connection not in kept:
                continue  # already removed together with another
            without = _connected([c for c in kept if c != connection], wiring.parts)
            then = off(without)
            if then <= allowed and then - now < worth:
                kept, now, pruning = without, then, True
    now = left(kept)
    effects = [now - left([c for c in kept if c != connection]) for connection in kept]
    complement = set(everything) - set(kept)
    return Circuit(
        measure.name,
        kept,
        [estimates[connection] for connection in kept],
        effects,
        faithfulness=now,
        completeness=left(complement),
        minimality=min(map(abs, effects), default=0.0),
        clean=high,
        corrupted=low,
        total=len(everything),
    )


def _fewest(
    ranked: list[Connection], parts: dict[str, list[str]], enough: Callable[[list[Connection]], bool]
) -> list[Connection]:
    """Return the shortest tested prefix of `ranked` that is enough, without unconnected parts; all if none is.

    Each tested prefix is a quarter longer than the one before.
    """
    count = 1
    while count < len(ranked):
        some = _connected(ranked[:count], parts)
        if some and enough(some):
            return some
        count = count * 5 // 4 + 1
    return ranked


def _connected(connections: list[Connection], parts: dict[str, list[str]]) -> list[Connection]:
    """Keep the connections on a path from input to output. A head is reached through its queries, keys or values."""
    kept = connections
    while True:
        reached = {"input"} | {part for c in kept for part in parts[c.receiver]}
        needed = {"output"} | {c.sender for c in kept}
        further = [c for c in kept if c.sender in reached and needed.intersection(parts[c.receiver])]
        if len(further) == len(kept):
            return kept
        kept = further
