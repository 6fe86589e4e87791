"""Positions: a learned slope per head, times the distance, added to the scores (after ALiBi, arXiv 2108.12409)."""

import torch

import minigpt


@minigpt.register("position", "linear_bias", help="a learned slope per head times the distance")
class LinearBias(torch.nn.Module):
    def __init__(self, config, *, slope: float = 0.1):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.full((config.n_head,), slope))

    def bias(self, queries, keys):  # (..., T), (S) -> (..., H, T, S)
        distance = (queries[..., :, None] - keys).clamp(min=0)
        return -self.slopes[:, None, None] * distance[..., None, :, :]
