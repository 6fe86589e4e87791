"""Attention rollout and value-weighted flow: attention of all layers multiplied.

In each block a position keeps part of its stream and reads the rest from the positions it attends to. Two methods
estimate the shares as a matrix whose rows sum to 1; the matrices of the blocks are multiplied:

    rollout      half from its own stream, half by attention weights, averaged over heads (Abnar & Zuidema 2020,
                 arXiv 2005.00928)
    value_flow   by the lengths of the vectors that are added, including the stream itself (Kobayashi et al. 2021,
                 arXiv 2109.07152); high attention to a token with a small output vector counts little

Both ignore MLPs and norms, and neither is causal: verify their results by patching.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.activations import Activations
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text
from minigpt.internals.attribution.weights import write_weights
from minigpt.model.precision import precise


def rollout(study: Access, text: Text, layer: int = -1) -> Result:
    """Attention rollout: shares of the source positions in the stream after a block; rows sum to 1.

    Args:
        study: see `Study`.
        text: one text.
        layer: index of the block.

    Returns:
        Position x source: the product over blocks 0 .. layer of (A + I) / 2, where A is the attention pattern averaged
        over the heads of a block.
    """
    layer, text = _checked(study, text, layer)
    _, cache = study.run_with_cache(text, "pattern")
    shares = []
    for below in range(layer + 1):
        pattern = cache["pattern", below][0].mean(0)  # (T, T)
        shares.append((pattern + torch.eye(len(pattern)).to(pattern)) / 2)
    return _product(study, text, shares, "Attention rollout")


def value_flow(study: Access, text: Text, layer: int = -1) -> Result:
    """Value-weighted flow: shares of the source positions in the stream after a block; rows sum to 1.

    Args:
        study: see `Study`.
        text: one text.
        layer: index of the block.

    Returns:
        Position x source: the product over blocks 0 .. layer of the matrices || sum over heads of A_ij v_j W_O ||, with
        x_i added inside the norm if j = i, and each row divided by its sum.
    """
    layer, text = _checked(study, text, layer)
    _, cache = study.run_with_cache(text, ["pattern", "v", "resid_pre"])
    shares = []
    for below in range(layer + 1):
        lengths = _lengths(study, cache, below)
        shares.append(lengths / lengths.sum(-1, keepdim=True))
    return _product(study, text, shares, "Value-weighted flow")


def _lengths(study: Access, cache: Activations, layer: int) -> Tensor:  # (T, T)
    """Length of the vector that each source position adds to each position."""
    weights = write_weights(study.model, layer)  # (H, D, C)
    group = len(weights) // cache["v", layer].shape[2]
    values = cache["v", layer][0].repeat_interleave(group, 1)  # (T, H, D)
    stream = cache["resid_pre", layer][0]  # (T, C)
    # Treat the stream itself as one more head that attends only to its own position.
    vectors = torch.cat([torch.einsum("jhd,hdc->jhc", values, weights), stream[:, None]], 1)  # (T, H + 1, C)
    pattern = cache["pattern", layer][0]  # (H, T, T)
    shares = torch.cat([pattern, torch.eye(len(stream)).to(pattern)[None]])  # (H + 1, T, T)
    between = vectors @ vectors.transpose(
        1, 2
    )  # (T, H + 1, H + 1): for each source, dot products of the heads' vectors
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
        raise ConfigError(f"layer: {layer}; expected 0 .. {layers - 1}")
    return layer % layers, ids
