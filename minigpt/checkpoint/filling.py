"""Load tensors into a model: checked before any allocation, without a copy where possible."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minigpt.errors import CheckpointError
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT, outline
from minigpt.model.positions import Rotary


def load_weights(model: GPT, state: dict[str, Tensor], where: Path | str) -> None:
    """Copy tensors into a model by name. Raises CheckpointError for a missing, left-over or misshapen one."""
    check_weights(model, state, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def check_weights(model: GPT, state: dict[str, Tensor], where: Path | str) -> None:
    """Raise CheckpointError where tensors do not fit a model, which may be one without memory."""
    parameters = dict(model.named_parameters())
    if missing := sorted(set(parameters) - set(state)):
        raise CheckpointError(f"{where}: lacks the tensors {missing[:4]}")
    if extra := sorted(set(state) - set(parameters)):
        raise CheckpointError(f"{where}: holds tensors this model has no place for: {extra[:4]}")
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the config says {tuple(parameter.shape)}"
            )
        if not state[name].is_floating_point():
            raise CheckpointError(f"{where}: {name} holds {state[name].dtype}; floating-point numbers were expected")


MOST_POSITIONS = 1 << 27  # of a rotary table, times its width: 512 MB


def empty_model(config: GPTConfig, *, dtype: torch.dtype, device: torch.device | str) -> GPT:
    """A GPT whose weights are yet to be loaded: allocated, not initialised, no random number drawn."""
    model = outline(config).to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.tie()
    _fill_tables(model, device)
    return model


def _fill_tables(model: GPT, device: torch.device | str) -> None:
    """Make the buffers, rotary tables once for all layers. Not by to_empty, which imports sympy for a tensor without
    memory. Buffers of a plug-in's part come from a model that is made with memory.
    """
    first: Rotary | None = None
    for module in model.modules():
        if isinstance(module, Rotary) and first is not None:
            module.cos, module.sin = first.cos, first.sin
        elif hasattr(module, "reset_buffers"):
            module.reset_buffers(device)  # type: ignore[operator]
            first = module if isinstance(module, Rotary) else first
    if any(buffer.is_meta for buffer in model.buffers()):
        with torch.random.fork_rng(devices=[]):
            made = GPT(model.config)
        for name, buffer in made.named_buffers():
            owner = model.get_submodule(name.rpartition(".")[0])
            if owner._buffers[name.rpartition(".")[2]].is_meta:  # type: ignore[union-attr]
                owner._buffers[name.rpartition(".")[2]] = buffer.to(device)


def filled_model(
    config: GPTConfig, state: dict[str, Tensor], where: Path | str, *, dtype: torch.dtype, device: torch.device | str
) -> GPT:
    """A GPT with these weights: the very tensors where dtype and device are theirs. Nothing is allocated before config
    and tensors agree, and nothing is filled twice.

    Raises CheckpointError where they do not agree.
    """
    try:
        model = outline(config)
    except RuntimeError as error:  # more numbers than can be counted
        raise CheckpointError(f"{where}: does not describe a valid model ({error})") from error
    check_weights(model, state, where)
    if any(module.cos.numel() > MOST_POSITIONS for module in model.modules() if isinstance(module, Rotary)):
        raise CheckpointError(f"{where}: block_size {config.block_size} is implausibly large; fix config.json")
    _fill_tables(model, device)
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        tensor = state[name].to(device=device, dtype=dtype).contiguous()
        setattr(module, name.rpartition(".")[2], torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    if config.tie_embeddings:
        model.tie()
    return model
