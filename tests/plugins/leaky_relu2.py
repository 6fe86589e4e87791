"""An activation: the square of a leaky ReLU."""

import torch.nn.functional as F

import minigpt


@minigpt.register("activation", "leaky_relu2", help="square of a leaky ReLU")
def leaky_relu2(pre, *, slope: float = 0.1):
    return F.leaky_relu(pre, slope).square()
