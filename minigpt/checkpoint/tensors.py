"""Safetensors files: written atomically, read without running code."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minigpt.durable import disk_errors, sync
from minigpt.errors import CheckpointError, NonFiniteError


def refuse_nonfinite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise NonFiniteError, naming the tensor, where one holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{what}, since {name} holds NaN or infinity; resume from an earlier checkpoint")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place; `save_tensors` writes it whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt", **(metadata or {})})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file whole or not at all; `load_tensors` and `load_metadata` read it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(str(path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(temporary, tensors, metadata)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def check_written(path: Path, tensors: dict[str, Tensor]) -> None:
    """What lies on the disk must be what is in memory: a hash of the file alone would only seal what went wrong."""
    with safetensors.safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name), tensor.detach().cpu()):
                raise CheckpointError(f"{path}: {name} does not read back as it was written; check the disk")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def load_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself. Raises CheckpointError where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
