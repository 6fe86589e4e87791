"""The optimizer: assign parameters to Muon and AdamW, and save and restore its state by parameter name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minigpt.errors import CheckpointError
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT
from minigpt.training.config import OptimizerConfig
from minigpt.training.recipe.muon import MuonAdamW
from minigpt.training.recipe.sharding import like

EMBEDDINGS = ("trunk.embed.", "trunk.bigram.", "trunk.trigram.")


def make_optimizer(model: GPT, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> MuonAdamW:
    """Create the optimizer: Muon for the matrices inside blocks if the config asks for it, AdamW for the rest.

    Weight decay applies to matrices and embeddings and shrinks all of them by the same fraction per step; norms and
    biases have none. A group's "scale" is its learning rate divided by optimizer.learning_rate; the schedule sets the
    latter.

    Args:
        model: the model to train.
        config: learning rates, weight decay, momenta.
        dtype: dtype of Muon's Newton-Schulz iterations.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    muon = [(n, p) for n, p in named if config.name == "muon" and ".blocks." in n and p.dim() == 2]
    large = model.config.zero_init and not model.config.tie_embeddings  # embedding entries are about 1, not 0.02
    embeddings = [(n, p) for n, p in named if large and n.startswith(EMBEDDINGS)]
    taken = {name for name, _ in muon + embeddings}
    rest = [parameter for name, parameter in named if name not in taken]
    adamw = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    orthogonal: dict[str, Any] = {"momentum": config.muon_momentum, "steps": config.newton_schulz_steps}
    orthogonal["splits"] = _splits(model, [parameter for _, parameter in muon])

    def group(parameters: list[nn.Parameter], rate: float, decay: float, settings: dict[str, Any]) -> dict[str, Any]:
        scale = rate / config.learning_rate
        return {"params": parameters, "lr": rate, "scale": scale, "weight_decay": decay / scale, **settings}

    groups = [
        group([p for p in rest if p.dim() >= 2], config.learning_rate, config.weight_decay, adamw),
        group([p for p in rest if p.dim() < 2], config.learning_rate, 0.0, adamw),
        group([p for _, p in embeddings], config.embedding_learning_rate, config.weight_decay, adamw),
        group([p for _, p in muon], config.muon_learning_rate, config.weight_decay, orthogonal),
    ]
    return MuonAdamW([each for each in groups if each["params"]], dtype)


def _splits(model: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[int, ...]]:
    """Row counts of the matrices stacked in each parameter: query, key and value weights share one parameter."""
    three_in_one = {
        module.qkv.weight: tuple(count * module.head_dim for count in (module.n_head, *[module.n_kv_head] * 2))
        for module in model.modules()
        if isinstance(module, Attention)
    }
    return [three_in_one.get(parameter, (parameter.shape[0],)) for parameter in parameters]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "<key>/<parameter name>" -> tensor, independent of parameter order and groups."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore the state from optimizer_tensors. Raises CheckpointError for a name or shape that does not match."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise CheckpointError(f"training_state.safetensors: {full_name} does not match a parameter of this model")
        laid_out = like(tensor, parameter) if tensor.dim() else tensor.to(parameter.device)
        optimizer.state[parameter][key] = laid_out.clone()
