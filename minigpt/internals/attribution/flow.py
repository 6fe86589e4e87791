"""Attention rollout and value-weighted flow: attention of all layers multiplied.

In a block a position keeps part of its stream and takes the rest from the positions that it looks at. Two ways to say
how much, each a matrix whose rows sum to 1, multiplied over the blocks:

    rollout      half its own stream, half by attention, the mean over heads (Abnar & Zuidema 2020, arXiv 2005.00928)
    value_flow   by the length of the vectors that are really added, the stream itself included (Kobayashi et al. 2021,
                 arXiv 2109.07152): a head that looks hard at a token of which it writes little moves little

Neither sees what MLPs and norms do, and neither is causal: what they suggest is to be tried by patching.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.decomposition import precise
from minigpt.internals.attribution.weights import write_weights


def rollout(study: Access, text: Text, layer: int = -1) -> Result:
    """Where the stream after a block came from: position x source, rows sum to 1.

    Args:
        study: see `Study`.
        text: one text.
        layer: after which block.

    The product over blocks 0 .. layer of (A + I) / 2, A the mean pattern of a block's heads.
    """
    layer, text = _checked(study, text, layer)
    _, cache = study.run_with_cache(text, "pattern")
    shares = []
    for below in range(layer + 1):
        pattern = cache["pattern", below][0].mean(0)  # (T, T)
        shares.append((pattern + torch.eye(len(pattern)).to(pattern)) / 2)
    return _product(study, text, shares, "Attention rollout")


def value_flow(study: Access, text: Text, layer: int = -1) -> Result:
    """Where the stream after a block came from, by the vectors added: position x source, rows sum to 1.

    Args:
        study: see `Study`.
        text: one text.
        layer: after which block.

    The product over blocks 0 .. layer of the rows of || sum over heads of A_ij v_j W_O, with x_i where j is i ||, each
    row divided by its sum.
    """
    layer, text = _checked(study, text, layer)
    _, cache = study.run_with_cache(text, ["pattern", "v", "resid_pre"])
    shares = []
    for below in range(layer + 1):
        lengths = _lengths(study, cache, below)
        shares.append(lengths / lengths.sum(-1, keepdim=True))
    return _product(study, text, shares, "Value-weighted flow")


def _lengths(study: Access, cache: Activations, layer: int) -> Tensor:  # (T, T)
    """How long the vector is that each source adds to each position."""
    weights = write_weights(study.model, layer)  # (H, D, C)
    group = len(weights) // cache["v", layer].shape[2]
    values = cache["v", layer][0].repeat_interleave(group, 1)  # (T, H, D)
    stream = cache["resid_pre", layer][0]  # (T, C)
    # The stream itself is one more head, which looks at its own position alone.
    vectors = torch.cat([torch.einsum("jhd,hdc->jhc", values, weights), stream[:, None]], 1)  # (T, H + 1, C)
    pattern = cache["pattern", layer][0]  # (H, T, T)
    shares = torch.cat([pattern, torch.eye(len(stream)).to(pattern)[None]])  # (H + 1, T, T)
    between = vectors @ vectors.transpose(1, 2)  # (T, H + 1, H + 1): of each source, products of what heads make of it
    return torch.einsum("hij,jhk,kij->ij", shares, between, shares).clamp(min=0).sqrt()


def _product(study: Access, text: Text, shares: list[Tensor], title: str) -> Result:
    total = shares[0]
    for share in shares[1:]:
        total = share @ total
    labels = [f"{i} {token}" for i, token in enumerate(study.tokens(text))]
    axes = (Axis("position", labels), Axis("source", labels))
    return Result(title, precise(total).numpy(), axes, "share", {"layer": len(shares) - 1})


def _checked(study: Access, text: Text, layer: int) -> tuple[int, Tensor]:
    layers, ids = study.config.n_layer, study.ids(text)
    if len(ids) > 1:
        raise DataError(f"text: {len(ids)} texts; give one text at a time")
    if not -layers <= layer < layers:
        raise ConfigError(f"layer: {layer}; the model's are 0 .. {layers - 1}")
    return layer % layers, ids
