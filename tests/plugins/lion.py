"""An optimizer: Lion, the sign of a mean of gradients (Chen et al. 2023, arXiv 2302.06675)."""

import torch

import minigpt


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (each for each in group["params"] if each.grad is not None):
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.lerp(mean, 0.9).sign())
                mean.lerp_(p.grad, 0.01)
        return loss


@minigpt.register("optimizer", "lion", help="the sign of a mean of gradients")
def lion(named_parameters, settings, *, decay: float = 0.1):
    return Lion([p for _, p in named_parameters], {"lr": settings.learning_rate, "weight_decay": decay})
