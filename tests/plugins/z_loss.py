"""An added loss: the squared log of the softmax's normalizer (Chowdhery et al. 2022, arXiv 2204.02311)."""

import minigpt


@minigpt.register("loss", "z_loss", help="squared log of the softmax's normalizer")
def z_loss(logits, targets, *, power: int = 2):  # (N, V), (N) -> (N)
    return logits.logsumexp(-1).abs() ** power
