"""Settings for training a sparse autoencoder, also used by the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minigpt.errors import ConfigError

Kind = Literal["topk", "batchtopk", "jumprelu"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Training settings of an autoencoder. Raises ConfigError, naming the field, for invalid values."""

    kind: Kind = "topk"
    """Activation function: topk, batchtopk or jumprelu."""
    k: int = 16
    """Active features per token; on average for batchtopk, the target for jumprelu."""
    d_sae: int | None = None
    """Number of features; 8 times the activation's width if not given."""
    steps: int = 1000
    """Number of optimizer steps."""
    batch: int = 1024
    """Tokens per step."""
    learning_rate: float = 2e-3
    """Adam's learning rate; warm-up over the first 5 % of the steps, decay to zero over the last 20 %."""
    sparsity: float = 1.0
    """jumprelu: weight of the sparsity loss (L0 / k - 1)^2."""
    seed: int = 0
    """Seed of the initial weights and of the order of the text."""

    def __post_init__(self) -> None:
        if self.kind not in ("topk", "batchtopk", "jumprelu"):
            raise ConfigError(f"kind: {self.kind!r} is not one of topk, batchtopk, jumprelu")
        for name in ("k", "d_sae", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: {value!r} is not a whole number from 1")
        if self.d_sae is not None and self.k > self.d_sae:
            raise ConfigError(f"k: {self.k} is more than the number of features (d_sae {self.d_sae})")
        for name in ("learning_rate", "sparsity"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a positive number")
