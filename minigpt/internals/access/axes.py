"""Axes that many results have: one number per head."""

from __future__ import annotations

from minigpt.internals.access.result import Axis
from minigpt.model.config import GPTConfig


def head_labels(config: GPTConfig) -> list[str]:
    """Names of all heads: L0H0, L0H1, ..."""
    return [f"L{layer}H{head}" for layer in range(config.n_layer) for head in range(config.n_head)]


def grid(config: GPTConfig) -> tuple[Axis, Axis]:
    """The axes of a number per head: layer x head."""
    layers, heads = range(config.n_layer), range(config.n_head)
    return Axis("layer", [str(layer) for layer in layers]), Axis("head", [f"H{head}" for head in heads])
