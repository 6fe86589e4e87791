"""Build the optimizer: which parameters Muon and AdamW get; optimizer state by parameter name, and its size.

An optimizer is a function (named_parameters, settings) -> torch.optim.Optimizer. It may also take `model` and `dtype`.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.errors import CheckpointError, ConfigError
from minigpt.model.attention import Attention
from minigpt.model.config import GPTConfig
from minigpt.model.cost import cost_of
from minigpt.model.gpt import GPT
from minigpt.training.config import OPTIMIZERS, OptimizerConfig
from minigpt.training.recipe.muon import MuonAdamW
from minigpt.training.recipe.sharding import like

Named = list[tuple[str, nn.Parameter]]

EMBEDDINGS = ("trunk.embed.", "trunk.bigram.", "trunk.trigram.")


def make_optimizer(model: GPT, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """Create the optimizer that the config names.

    Every group holds "scale", the ratio of its learning rate to optimizer.learning_rate, which follows the schedule.

    Args:
        model: the model to optimize.
        config: learning rates, weight decay and momenta.
        dtype: dtype of Muon's Newton-Schulz iterations.

    Raises ConfigError if a plug-in's function does not return an optimizer over these parameters.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    make = OPTIMIZERS.bound(config.name, config.own("name"))
    offered = {"model": model, "dtype": dtype}
    takes = inspect.signature(make).parameters
    made = make(named, config, **{name: value for name, value in offered.items() if name in takes})
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer.name: '{config.name}' returned {type(made).__name__}, not a torch.optim.Optimizer"
        )
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if missing := [name for name, parameter in named if id(parameter) not in held]:
        raise ConfigError(f"optimizer.name: '{config.name}' leaves out {len(missing)} parameters, such as {missing[0]}")
    for group in made.param_groups:
        group.setdefault("scale", 1.0)
    return made


def adamw(named: Named, settings: OptimizerConfig, *, model: GPT, dtype: torch.dtype) -> MuonAdamW:
    """AdamW for all parameters. Matrices and embeddings have weight decay, norms and biases have none."""
    return MuonAdamW(_groups(named, settings, model, set()), dtype)


def muon(named: Named, settings: OptimizerConfig, *, model: GPT, dtype: torch.dtype) -> MuonAdamW:
    """Muon for the matrices inside blocks, AdamW for all other parameters; weight decay as in adamw."""
    matrices = {name for name, parameter in named if ".blocks." in name and parameter.dim() == 2}
    return MuonAdamW(_groups(named, settings, model, matrices), dtype)


adamw.remembers = lambda cost: 2 * cost.parameters  # type: ignore[attr-defined]
muon.remembers = lambda cost: 2 * cost.parameters - cost.matrix_parameters  # type: ignore[attr-defined]


def _groups(named: Named, config: OptimizerConfig, model: GPT, matrices: set[str]) -> list[dict[str, Any]]:
    """Parameter groups; the same weight decay per step for all that have any."""
    muon = [(n, p) for n, p in named if n in matrices]
    large = model.config.zero_init and not model.config.tie_embeddings  # standard deviation about 1, not 0.02
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
    return [each for each in groups if each["params"]]


def optimizer_bytes(model: GPTConfig, config: OptimizerConfig) -> float:
    """Bytes of an optimizer's state, without counters: what it declares, or measured on a small model of the same kind.

    Args:
        model: config of the model; vocab_size must be set.
        config: the optimizer's settings.
    """
    cost = cost_of(model)
    declared = OPTIMIZERS.fact(config.name, "remembers") or getattr(OPTIMIZERS[config.name], "remembers", None)
    if declared is not None:
        return 4.0 * declared(cost)
    with torch.random.fork_rng(devices=[]):
        small = GPT(replace(model, vocab_size=8, block_size=4, n_layer=1, bigram_rows=0, trigram_rows=0))
        optimizer = make_optimizer(small, config)
        small(torch.zeros(1, 4, dtype=torch.int64)).square().mean().backward()
        optimizer.step()
    rates = {}  # tensor elements remembered per element of a matrix inside a block, and of any other parameter
    for inside in (True, False):
        chosen = [p for n, p in small.named_parameters() if (".blocks." in n and p.dim() == 2) == inside]
        states = [t for p in chosen for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor) and t.dim()]
        rates[inside] = sum(t.nbytes for t in states) / max(1, sum(p.numel() for p in chosen))
    return rates[True] * cost.matrix_parameters + rates[False] * (cost.parameters - cost.matrix_parameters)


def _splits(model: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[int, ...]]:
    """Row counts of the matrices stacked in each parameter: a qkv weight holds three, other parameters one."""
    three_in_one = {
        module.qkv.weight: tuple(count * module.head_dim for count in (module.n_head, *[module.n_kv_head] * 2))
        for module in model.modules()
        if isinstance(module, Attention)
    }
    return [three_in_one.get(parameter, (parameter.shape[0],)) for parameter in parameters]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as a dict "<key>/<parameter name>" -> tensor, independent of parameter order and groups."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the result of optimizer_tensors. Raises CheckpointError if a name or shape does not match the model."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise CheckpointError(f"training_state.safetensors: {full_name} matches no parameter of this model")
        laid_out = like(tensor, parameter) if tensor.dim() else tensor.to(parameter.device)
        optimizer.state[parameter][key] = laid_out.clone()
