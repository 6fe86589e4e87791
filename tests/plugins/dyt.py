"""A norm: DynTanh, weight * tanh(alpha x) + bias (Zhu et al. 2025, arXiv 2503.10622)."""

import torch

import minigpt


@minigpt.register("norm", "dyt", help="weight * tanh(alpha x) + bias")
class DynTanh(torch.nn.Module):
    def __init__(self, width, config, *, alpha: float = 0.5):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor(alpha))
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x):  # (..., C) -> (..., C)
        return self.weight * torch.tanh(self.alpha * x) + self.bias
