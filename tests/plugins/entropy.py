"""An analysis: the entropy of every head's attention, averaged over the text."""

import minigpt
from minigpt.internals.access.axes import grid
from minigpt.internals.access.result import Result


@minigpt.register("analysis", "attention_entropy", help="Entropy of each head's attention, in nats")
def attention_entropy(study, text, *, skip: int = 0):
    _, cache = study.run_with_cache(text, ["pattern"])
    layers = [cache["pattern", layer][:, :, skip:] for layer in range(study.config.n_layer)]  # (B, H, T, S)
    means = [(-p * p.clamp(min=1e-30).log()).sum(-1).mean((0, 2)).tolist() for p in layers]
    return Result("attention entropy", means, grid(study.config), "nats")
