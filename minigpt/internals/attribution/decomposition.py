"""Residual stream decomposition: embeddings plus the output of every attention layer and MLP.

    study.components("ROMEO:", by="head")                       terms that sum exactly to the final stream
    study.components("ROMEO:", by="component", at=("resid_mid", 2), read="share")
    study.accumulated("ROMEO:")                                 the stream itself at successive points

The terms follow Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.names import Names, listed, select
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import Block
from minigpt.model.precision import precise

By = Literal["layer", "component", "head", "neuron"]
UNITS = ("layer", "component", "head", "neuron")
KINDS = ("resid_pre", "resid_mid", "resid_post")


class Point(NamedTuple):
    """A point of the residual stream: before, in the middle of, or after a block."""

    layer: int
    kind: str
    """resid_pre, resid_mid or resid_post."""

    @property
    def label(self) -> str:
        """Label in results: "3 mid"."""
        return f"{self.layer} {self.kind.removeprefix('resid_')}"

    @property
    def name(self) -> str:
        """Full name of the activation."""
        return f"blocks.{self.layer}.hook_{self.kind}"

    @property
    def written_by(self) -> Point:
        """The equivalent point after the previous block: resid_pre of block 2 is resid_post of block 1."""
        return Point(self.layer - 1, "resid_post") if self.kind == "resid_pre" and self.layer else self


class Part(NamedTuple):
    """Some terms of a residual stream, as vectors or as coefficients of fixed directions."""

    labels: list[str]
    values: Tensor
    """(B, T, n, C); with rows (B, T, n)."""
    rows: Tensor | None = None
    """(n, C): term i is values[..., i] * rows[i]. Saves memory for neurons."""

    def written(self) -> Tensor:
        """The vector of each term, (B, T, n, C)."""
        return self.values if self.rows is None else self.values[..., None] * self.rows

    def total(self) -> Tensor:
        """Sum of all terms, (B, T, C)."""
        return self.values.sum(2) if self.rows is None else self.values @ self.rows

    def along(self, direction: Tensor) -> Tensor:  # (C) -> (B, T, n)
        """Dot product of each term with a direction, in float64 on the CPU."""
        values, direction = precise(self.values), precise(direction)
        return values @ direction if self.rows is None else values * (precise(self.rows) @ direction)


def points(config: GPTConfig, at: str | Iterable[str] = KINDS) -> list[Point]:
    """List the points of the given kinds in the order of computation, without duplicates.

    resid_pre of a block equals resid_post of the previous block, so it is left out if both are requested.
    Raises ConfigError for a kind other than resid_pre, resid_mid, resid_post.
    """
    kinds = [kind.removeprefix("hook_") for kind in listed(at)]
    if not kinds or set(kinds) - set(KINDS):
        raise ConfigError(f"at: {', '.join(kinds) or 'nothing'}; expected some of {', '.join(KINDS)}")
    there = [Point(layer, kind) for layer in range(config.n_layer) for kind in KINDS if kind in kinds]
    return [point for point in there if point.written_by == point or point.written_by not in there]


def point_of(config: GPTConfig, at: Names) -> Point:
    """Return the point that a name selects. Raises ConfigError if it selects several or another activation."""
    found = select(config, at)
    if len(found) != 1 or not found[0].rpartition("hook_")[2].startswith("resid_"):
        raise ConfigError(f"at: {at!r}; expected one point of the residual stream, such as ('resid_post', -1)")
    return Point(int(found[0].split(".")[1]), found[0].rpartition("hook_")[2])


def one_text(study: Access, text: Text) -> tuple[Tensor, list[str]]:
    """Return the ids (1, T) of one text and a unique label for each token: "3 the".

    Raises DataError for several texts.
    """
    ids = study.ids(text)
    if len(ids) != 1:
        raise DataError(f"text: {len(ids)} texts; give one text at a time")
    return ids, [f"{place} {token}" for place, token in enumerate(study.tokens(ids))]


def writers(config: GPTConfig, by: str, end: Point) -> list[str]:
    """Full names of the activations that the terms up to `end` are computed from.

    Raises ConfigError for a `by` other than layer, component, head, neuron.
    """
    if by not in UNITS:
        raise ConfigError(f"by: {by!r} is not one of {', '.join(UNITS)}")
    attention = "attn.hook_result" if by == "head" else "hook_attn_out"
    mlp = "mlp.hook_post" if by == "neuron" else "hook_mlp_out"
    names = [name for name in select(config, None) if name.endswith("embed")]
    for layer in range(end.layer + 1):
        if layer < end.layer or end.kind != "resid_pre":
            names.append(f"blocks.{layer}.{attention}")
        if layer < end.layer or end.kind == "resid_post":
            names.append(f"blocks.{layer}.{mlp}")
    return names


def parts_of(study: Access, cache: Activations, by: str, end: Point) -> list[Part]:
    """Return the terms that sum to the stream at `end`; `cache` must hold the `writers` and the stream at `end`.

    Active edits (`Study.hooks`) may change the stream itself. The last part, "edits", is then the difference between
    the stream and the sum of the components.
    """
    found = []
    for name in writers(study.config, by, end):
        value, what = cache[name], name.rpartition("hook_")[2]
        if not name.startswith("blocks."):
            found.append(Part([what], value[:, :, None]))
            continue
        layer = int(name.split(".")[1])
        block = study.model.trunk.blocks[layer]
        assert isinstance(block, Block)
        if what == "result":
            found.append(Part([f"L{layer}H{head}" for head in range(value.shape[2])], value))
            found += _bias(f"L{layer} attn bias", block.attn.proj.bias, value)
        elif what == "post":
            labels = [f"L{layer}N{neuron}" for neuron in range(value.shape[2])]
            found.append(Part(labels, value, block.mlp.down.weight.T))
            found += _bias(f"L{layer} mlp bias", block.mlp.down.bias, value)
        elif by == "layer" and what == "mlp_out":
            found[-1] = Part([str(layer)], found[-1].values + value[:, :, None])
        else:
            label = str(layer) if by == "layer" else f"L{layer} {what.removesuffix('_out')}"
            found.append(Part([label], value[:, :, None]))
    if study.watch().edits:
        rest = cache[end.name] - torch.stack([part.total() for part in found]).sum(0)
        found.append(Part(["edits"], rest[:, :, None]))
    return found


def _bias(label: str, bias: Tensor | None, like: Tensor) -> list[Part]:
    if bias is None:
        return []
    return [Part([label], bias.expand(*like.shape[:2], 1, -1))]


def components(
    study: Access,
    text: Text,
    by: By = "component",
    at: Names = ("resid_post", -1),
    *,
    read: Literal["vector", "norm", "share"] = "vector",
    positions: Sequence[int] | None = None,
) -> Result:
    """Decompose the residual stream at one point into the terms that sum to it.

    Args:
        study: the study of the model.
        text: one text.
        by: layer: the embeddings and each block. component: each attention layer and MLP ("L2 mlp"). head: each head,
            with the attention bias as a separate term. neuron: each MLP neuron, with the MLP bias as a separate term.
        at: point of the stream: resid_pre, resid_mid or resid_post of a layer.
        read: vector: the term itself. norm: its Euclidean length. share: its dot product with the stream, divided by
            the squared length of the stream; shares sum to 1 at each token.
        positions: only these tokens; None: all. With by="neuron", the vectors of long texts need much memory.

    Returns:
        A result with the axes component, token and, for vectors, d_model. The vectors sum over components to the
        stream, up to floating-point rounding. The notes hold the largest remainder of that sum.

    Raises:
        ConfigError: invalid `at`, `by` or `read`.
    """
    if read not in ("vector", "norm", "share"):
        raise ConfigError(f"read: {read!r} is not one of vector, norm, share")
    end = point_of(study.config, at)
    ids, tokens = one_text(study, text)
    _, cache = study.run_with_cache(ids, [*writers(study.config, by, end), end.name], positions=positions, stop=True)
    with torch.no_grad():
        parts = parts_of(study, cache, by, end)
        stream = precise(cache[end.name][0])  # (T, C)
        total = torch.stack([precise(part.total()[0]) for part in parts]).sum(0)
        # One part at a time, because the vectors of all neurons take much memory: (T, n) each, or (T, n, C).
        values = torch.cat([_read(precise(part.written()[0]), stream, read) for part in parts], 1).transpose(0, 1)
        labels = [label for part in parts for label in part.labels]
        kept = range(len(tokens)) if cache.positions is None else cache.positions
        axes: list[Any] = [Axis("component", labels), Axis("token", [tokens[place] for place in kept])]
        if read == "vector":
            axes.append(Axis("d_model", [str(channel) for channel in range(values.shape[-1])]))
        notes = {"remainder": float((total - stream).abs().max())}
        unit = {"vector": "", "norm": "length", "share": "share of the stream"}[read]
        return Result(f"{end.label}, by {by}", values.numpy(), tuple(axes), unit, notes)


def _read(terms: Tensor, stream: Tensor, read: str) -> Tensor:  # (T, n, C), (T, C) -> (T, n, C) or (T, n)
    if read == "vector":
        return terms
    if read == "norm":
        return terms.norm(dim=-1)
    return (terms @ stream[:, :, None])[..., 0] / stream.square().sum(-1, keepdim=True)


def accumulated(study: Access, text: Text, at: str | Iterable[str] = KINDS) -> Result:
    """Return the residual stream at successive points.

    Args:
        study: the study of the model.
        text: one text.
        at: points of each block: one or more of resid_pre, resid_mid, resid_post.

    Returns:
        A result with the axes stream ("0 pre", "0 mid", "0 post", "1 mid", ...), token, d_model.
    """
    where = points(study.config, at)
    ids, tokens = one_text(study, text)
    _, cache = study.run_with_cache(ids, [point.name for point in where], stop=True)
    values = precise(torch.stack([cache[point.name][0] for point in where])).numpy()
    channels = [str(channel) for channel in range(values.shape[-1])]
    labels = [point.label for point in where]
    return Result("the stream", values, (Axis("stream", labels), Axis("token", tokens), Axis("d_model", channels)))
