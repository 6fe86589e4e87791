"""Muon, momentum with orthogonalised updates, for the matrices inside blocks, and AdamW for all other parameters.

One optimizer contains both, so that there is one `step()`, one state and one learning-rate schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from minigpt.training.recipe.sharding import by_whole_matrices, local

# Coefficients of the quintic iteration that moves singular values towards 1 (Jordan 2024,
# kellerjordan.github.io/posts/muon).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz iterations: approximate the nearest matrix with orthonormal rows or columns, for a stack of them.

    Args:
        matrices: (N, rows, columns).
        steps: number of iterations; five bring the singular values to between about 0.7 and 1.2.
        dtype: dtype of the computation.

    Returns:
        (N, rows, columns) in `dtype`.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Updates parameter groups with "splits" by Muon, and all others by fused AdamW.

    A Muon group's "splits" has one tuple per parameter: the row counts of the matrices stacked in it (such as query,
    key and value weights). Each of these is orthogonalised separately. The result equals torch.optim.Muon
    (adjust_lr_fn="original") on the separate matrices.

    Args:
        groups: parameter groups with lr and weight_decay; for AdamW also betas and eps, for Muon momentum and steps.
        dtype: dtype of the Newton-Schulz iterations.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "splits" in group:
                self._muon(group)
            else:
                self._adamw(group)
        return loss

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict[str, Any]) -> None:
        same_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)  # (matrix, its update)
        in_pieces: dict[tuple[Any, ...], list[tuple[DTensor, Tensor]]] = defaultdict(list)  # (parameter, its update)
        momentum = group["momentum"]
        for parameter, splits in zip(group["params"], group["splits"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient, mean = local(parameter.grad), local(state["momentum"])
            mean.lerp_(gradient, 1 - momentum)
            update = gradient.lerp(mean, momentum)  # Nesterov
            if isinstance(parameter, DTensor):
                in_pieces[parameter.shape, splits].append((parameter, update))
                continue
            for matrix, part in zip(parameter.split(splits), update.split(splits), strict=True):
                rows, columns = matrix.shape
                same_shape[min(rows, columns), max(rows, columns)].append((matrix, part))
        for pairs in same_shape.values():
            # Transpose tall matrices, so that all have one shape and need one batched product.
            stack = torch.stack([part if part.shape[0] <= part.shape[1] else part.mT for _, part in pairs])
            for (matrix, _), update in zip(pairs, orthogonalize(stack, group["steps"], self.dtype), strict=True):
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.mT if rows > columns else update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
        for (_, splits), sharded in in_pieces.items():
            # Orthogonalisation needs whole matrices: each process computes some of them and sends the shards.
            whole_updates = partial(self._split_orthogonal, splits, group["steps"])
            updates = by_whole_matrices([update for _, update in sharded], sharded[0][0], whole_updates)
            for (parameter, _), update in zip(sharded, updates, strict=True):
                local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _split_orthogonal(self, splits: tuple[int, ...], steps: int, stack: Tensor) -> Tensor:
        """Split a stack of updates (N, rows, columns) by rows, orthogonalise the parts and scale them as in _muon."""
        parts = [
            orthogonalize(part, steps, self.dtype) * max(1, part.shape[-2] / part.shape[-1]) ** 0.5
            for part in stack.split(splits, dim=-2)
        ]
        return torch.cat(parts, dim=-2)
