"""Residual stream decomposition: embeddings plus the output of every attention layer and MLP.

    study.components("ROMEO:", by="head")                       terms that sum to the last stream exactly
    study.components("ROMEO:", by="component", at=("resid_mid", 2), read="share")
    study.accumulated("ROMEO:")                                 the stream itself, from point to point

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

By = Literal["layer", "component", "head", "neuron"]
UNITS = ("layer", "component", "head", "neuron")
KINDS = ("resid_pre", "resid_mid", "resid_post")


def precise(x: Tensor) -> Tensor:
    """In double precision, on the CPU: not every device has it."""
    return x.detach().cpu().double()


class Point(NamedTuple):
    """A place where the stream can be read: before, in the middle of, or after a block."""

    layer: int
    kind: str
    """resid_pre, resid_mid or resid_post."""

    @property
    def label(self) -> str:
        """As results name it: "3 mid"."""
        return f"{self.layer} {self.kind.removeprefix('resid_')}"

    @property
    def name(self) -> str:
        """The activation's full name."""
        return f"blocks.{self.layer}.hook_{self.kind}"

    @property
    def written_by(self) -> Point:
        """The same place seen from the block before: what block 2 receives is what block 1 left."""
        return Point(self.layer - 1, "resid_post") if self.kind == "resid_pre" and self.layer else self


class Part(NamedTuple):
    """Some terms of a stream: what each writes, or how strongly along which direction of its own."""

    labels: list[str]
    values: Tensor
    """(B, T, n, C); with rows (B, T, n)."""
    rows: Tensor | None = None
    """(n, C): neuron i writes values[..., i] times rows[i], which need not be stored."""

    def written(self) -> Tensor:
        """What each term writes, (B, T, n, C)."""
        return self.values if self.rows is None else self.values[..., None] * self.rows

    def total(self) -> Tensor:
        """What all terms write together, (B, T, C)."""
        return self.values.sum(2) if self.rows is None else self.values @ self.rows

    def along(self, direction: Tensor) -> Tensor:  # (C) -> (B, T, n)
        """Each term's dot product with a direction, in double precision on the CPU."""
        values, direction = precise(self.values), precise(direction)
        return values @ direction if self.rows is None else values * (precise(self.rows) @ direction)


def points(config: GPTConfig, at: str | Iterable[str] = KINDS) -> list[Point]:
    """Where streams are read, in the order of computation, each stream once: what a block receives is left out where
    what the block before it left is asked for too.

    Raises ConfigError for a kind that is none of resid_pre, resid_mid, resid_post.
    """
    kinds = [kind.removeprefix("hook_") for kind in listed(at)]
    if not kinds or set(kinds) - set(KINDS):
        raise ConfigError(f"at: {', '.join(kinds) or 'nothing'}; expected some of {', '.join(KINDS)}")
    there = [Point(layer, kind) for layer in range(config.n_layer) for kind in KINDS if kind in kinds]
    return [point for point in there if point.written_by == point or point.written_by not in there]


def point_of(config: GPTConfig, at: Names) -> Point:
    """The one place in the stream that a name means. Raises ConfigError where it is another activation, or several."""
    found = select(config, at)
    if len(found) != 1 or not found[0].rpartition("hook_")[2].startswith("resid_"):
        raise ConfigError(f"at: {at!r}; expected one place in the stream, such as ('resid_post', -1)")
    return Point(int(found[0].split(".")[1]), found[0].rpartition("hook_")[2])


def one_text(study: Access, text: Text) -> tuple[Tensor, list[str]]:
    """Ids (1, T) of one text, and a label that is its own for each token: "3 the".

    Raises DataError for several texts.
    """
    ids = study.ids(text)
    if len(ids) != 1:
        raise DataError(f"text: {len(ids)} texts; this takes one at a time")
    return ids, [f"{place} {token}" for place, token in enumerate(study.tokens(ids))]


def writers(config: GPTConfig, by: str, end: Point) -> list[str]:
    """The full names of the activations that the terms up to `end` are made of.

    Raises ConfigError for a `by` that is none of layer, component, head, neuron.
    """
    if by not in UNITS:
        raise ConfigError(f"by: {by!r} is none of {', '.join(UNITS)}")
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
    """The terms that sum to the stream at `end`, of a run that kept `writers` and the stream there.

    Edits that are open (`Study.hooks`) may change the stream itself, so that no component wrote what is in it: then the
    last part, "edits", is what they put there.
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
    """The terms that the stream at one place is the sum of.

    Args:
        study: of the model.
        text: one text.
        by: layer: the embeddings and each block. component: each attention and each MLP ("L2 mlp"). head: each head,
            the attention's bias apart. neuron: each neuron of the MLPs, their bias apart.
        at: where: resid_pre, resid_mid or resid_post of a layer.
        read: vector: what each term writes. norm: its length. share: its dot product with the stream over the stream's
            with itself, which sums to 1 at each token.
        positions: of these tokens only; None: all. By neuron, vectors of long texts fill the memory.

    Returns:
        Axes component, token and, for vectors, d_model. The vectors sum over components to the stream exactly, to the
        rounding of the model's numbers. The notes hold the largest remainder of that sum.

    Raises:
        ConfigError: a name, unit or reading that there is not.
    """
    if read not in ("vector", "norm", "share"):
        raise ConfigError(f"read: {read!r} is none of vector, norm, share")
    end = point_of(study.config, at)
    ids, tokens = one_text(study, text)
    _, cache = study.run_with_cache(ids, [*writers(study.config, by, end), end.name], positions=positions, stop=True)
    with torch.no_grad():
        parts = parts_of(study, cache, by, end)
        stream = precise(cache[end.name][0])  # (T, C)
        total = torch.stack([precise(part.total()[0]) for part in parts]).sum(0)
        # Part by part, since all neurons' vectors are many: (T, n) each, or (T, n, C).
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
    """The stream from place to place, as each block adds to it.

    Args:
        study: of the model.
        text: one text.
        at: at which places of each block: some of resid_pre, resid_mid, resid_post.

    Returns:
        Axes stream ("0 pre", "0 mid", "0 post", "1 mid", ...), token, d_model.
    """
    where = points(study.config, at)
    ids, tokens = one_text(study, text)
    _, cache = study.run_with_cache(ids, [point.name for point in where], stop=True)
    values = precise(torch.stack([cache[point.name][0] for point in where])).numpy()
    channels = [str(channel) for channel in range(values.shape[-1])]
    labels = [point.label for point in where]
    return Result("the stream", values, (Axis("stream", labels), Axis("token", tokens), Axis("d_model", channels)))
