"""Circuits: find and evaluate the few connections that carry a behaviour.

    input -> L0H1 -> L1H0.k -> L1H0 -> output

The stream is a sum, so that a part reads what earlier parts wrote, each through a connection of its own. To cut one is
to let its receiver read what the sender writes on a corrupted text, while all others read what it writes here. A
circuit is the connections that are kept; the rest are cut:

    faithfulness    what is left of the behaviour      (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted))
    completeness    what its complement still does     the same with the circuit cut and the rest kept; 0 is best
    minimality      the least that any one connection of it is worth: how far faithfulness moves without it

A part that works against the behaviour makes a circuit without it more than faithful, so that what counts is how far
faithfulness is from 1.

All connections are first ranked by a linear estimate from two forwards and one backward (Syed et al. 2023, arXiv
2310.10348): (sender on the corrupted text - sender) . d m / d receiver. The fewest of the highest that are faithful
enough are then pruned exactly, one by one from the lowest (Conmy et al. 2023, arXiv 2304.14997).
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
    """From what a part writes to what another reads."""

    sender: str
    """input (all embeddings), a head such as L0H1, or L0 mlp."""
    receiver: str
    """A head's queries, keys or values, such as L1H0.q (of grouped heads: keys and values of L1G0); L1 mlp; output."""


@dataclass
class Circuit(Tabled):
    """The connections that were kept, and how well they do."""

    metric: str
    connections: list[Connection]
    """Strongest first, by the linear estimate."""
    estimates: list[float]
    """What cutting each alone would change the metric by, estimated."""
    effects: list[float]
    """Faithfulness that the circuit loses without each; negative where it works against the behaviour."""
    faithfulness: float
    completeness: float
    minimality: float
    clean: float
    """The metric on the clean text."""
    corrupted: float
    """And on the corrupted one."""
    total: int
    """How many connections the model has."""

    def to_dict(self) -> dict[str, Any]:
        """A graph as JSON has it."""
        figures = {name: getattr(self, name) for name in (*FIGURES, "clean", "corrupted", "metric", "total")}
        rows = zip(self.connections, self.estimates, self.effects, strict=True)
        edges = [{"from": c.sender, "to": c.receiver, "estimate": e, "effect": f} for c, e, f in rows]
        return {**figures, "nodes": sorted({end for c in self.connections for end in c}), "edges": edges}

    def table(self) -> Result:
        """Connections x (estimate, worth)."""
        labels = [f"{c.sender} -> {c.receiver}" for c in self.connections]
        values = np.stack([self.estimates, self.effects], 1).reshape(len(labels), 2)
        notes = {name: getattr(self, name) for name in (*FIGURES, "clean", "corrupted")}
        axes = (Axis("connection", labels), Axis("figure", ["estimate", "worth"]))
        return Result(f"Circuit for {self.metric}", values, axes, "", notes)

    def save(self, path: str | Path) -> Path:
        """Write the graph as .json, or its table as .csv, .npz or .html."""
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
    """A model's connections on one pair of texts, and the runs in which some are cut.

    Args:
        study: of the model.
        clean: ids (B, T).
        corrupted: ids (B, T).
        metric: bound to the clean text.
    """

    def __init__(self, study: Access, clean: Tensor, corrupted: Tensor, metric: Bound) -> None:
        self.study, self.clean, self.metric = study, clean, metric
        config = study.config
        heads, groups = config.n_head, config.n_kv_head or config.n_head
        part = "H" if groups == config.n_head else "G"
        self.senders = ["input"]
        self.receivers: dict[str, list[str]] = {}  # by the activation that they read, in its order
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
        self.parts: dict[str, list[str]] = {}  # the senders that a receiver belongs to
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
        """How many senders write before a receiver reads: they stand in order."""
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
        """Every connection."""
        return [
            Connection(sender, receiver)
            for name, receivers in self.receivers.items()
            for receiver in receivers
            for sender in self.senders[: self.reach[name]]
        ]

    def run(self, cut: Iterable[Connection] | dict[Connection, float]) -> float:
        """The metric with these connections cut; a number from 0 to 1 cuts one partly."""
        shares = cut if isinstance(cut, dict) else dict.fromkeys(cut, 1.0)
        written: list[Tensor] = []  # what senders write in this run, in their order

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

        # A block's stream is recorded before it is read, its sum edited after everything has been written.
        edits: dict[str, Edit] = dict.fromkeys(self.writes, record)
        edits |= {name: reader(name) for name in self.receivers}
        with self.study.hooks(edits):
            logits = self.study.logits(self.clean)
        return float(self.metric.of(logits[:, self.metric.positions]))

    def estimates(self) -> dict[Connection, float]:
        """What cutting each connection alone would change the metric by, to first order."""
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
    """The connections that carry the difference between two texts: few, faithful, each worth something.

    Args:
        study: of the model.
        clean: a text on which the model shows the behaviour, or several of equal length.
        corrupted: as many of the same length, on which it does not.
        metric: what measures it: `minigpt.internals.causal.effect.logit_difference(answer, versus)` and the like, or a
            function of logits (B, T, V).
        faithfulness: how near to 1 it is to be: 0.9 is from 0.9 to 1.1.
        worth: a connection goes where faithfulness gets further from 1 by less than this without it.

    Raises:
        DataError: texts of different numbers of tokens, or between which the metric does not differ.
        ConfigError: a share outside 0 to 1, or edits that are open.
    """
    if not 0 < faithfulness <= 1 or not 0 <= worth < 1:
        raise ConfigError(f"faithfulness {faithfulness}, worth {worth}: expected shares from 0 to 1")
    if study.watch().edits:
        raise ConfigError("find_circuit: inside `with study.hooks(...)`, which would not reach all its runs")
    ids, other = study.ids(clean), study.ids(corrupted)
    if ids.shape != other.shape:
        raise DataError(f"texts of {tuple(ids.shape)} and {tuple(other.shape)} tokens: expected equal shapes")
    measure = as_metric(metric)
    wiring = Wiring(study, ids, other, measure.bind(study, ids))
    everything = wiring.all()
    high, low = wiring.run(()), wiring.run(everything)
    if abs(high - low) < 1e-6 * max(1.0, abs(high)):
        raise DataError(f"{measure.name}: is {high:.6g} on both texts; choose texts between which it differs")

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
                continue  # it went with another
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
    """The first beginning that is enough, without what leads nowhere; each is a quarter longer. All of it always is."""
    count = 1
    while count < len(ranked):
        some = _connected(ranked[:count], parts)
        if some and enough(some):
            return some
        count = count * 5 // 4 + 1
    return ranked


def _connected(connections: list[Connection], parts: dict[str, list[str]]) -> list[Connection]:
    """Those on a way from the input to the output, in their order. A head is reached by its queries, keys or values."""
    kept = connections
    while True:
        reached = {"input"} | {part for c in kept for part in parts[c.receiver]}
        needed = {"output"} | {c.sender for c in kept}
        further = [c for c in kept if c.sender in reached and needed.intersection(parts[c.receiver])]
        if len(further) == len(kept):
            return kept
        kept = further
