"""The cache of a watched forward pass: activations by full or short name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.names import activations, full_name, select
from minigpt.model.config import GPTConfig


class Activations(Mapping[str, Tensor]):
    """A mapping from names to activations; the first axis of each is the batch.

        cache["blocks.5.attn.hook_pattern"]    full name
        cache["pattern", 5]                    short name and layer
        cache["resid_post", -1]                last block
        cache["embed"]                         short name without layer, if it is unique
        cache.stack("z")                       all layers, stacked to (layers, ...)

    Args:
        config: config of the model.
        values: activations by full name.
        positions: positions that were kept; None: all.
    """

    def __init__(self, config: GPTConfig, values: dict[str, Tensor], positions: list[int] | None = None) -> None:
        self.config, self.values_by_name, self.positions = config, values, positions

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        if isinstance(name, tuple):
            name = full_name(self.config, *name)
        elif name not in self.values_by_name:
            found = select(self.config, name)
            if len(found) > 1:
                raise ConfigError(f"activation {name!r}: there is one per layer; give the layer, as in [{name!r}, 0]")
            name = found[0]
        if name not in self.values_by_name:
            raise ConfigError(f"activation {name!r}: was not kept in this forward pass; request it with names=")
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __contains__(self, name: object) -> bool:
        try:
            self[name]  # type: ignore[index]
        except (ConfigError, TypeError):
            return False
        return True

    def stack(self, name: str) -> Tensor:
        """Stack an activation over all layers, (layers, ...)."""
        return torch.stack([self[name, layer] for layer in range(self.config.n_layer)])

    def axes(self, name: str | tuple[str, int]) -> tuple[str, ...]:
        """Names of an activation's axes."""
        full = full_name(self.config, *name) if isinstance(name, tuple) else select(self.config, name)[0]
        return activations(self.config)[full].axes

    def to(self, device: torch.device | str) -> Activations:
        """Return a copy with all activations on `device`."""
        moved = {name: value.to(device) for name, value in self.values_by_name.items()}
        return Activations(self.config, moved, self.positions)

    def __repr__(self) -> str:
        lines = [f"{name:40} {' '.join(map(str, value.shape))}" for name, value in self.values_by_name.items()]
        return "\n".join([f"Activations: {len(self)}", *lines])
