"""The learning rate as a pure function of the step, so there is no scheduler state to save."""

from __future__ import annotations

import math

from minigpt.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate of step `step` (0 is the first of `max_steps`).

    It rises linearly and reaches the peak at step warmup_steps. After that:

    cosine: decays to the final rate as (1 + cos(pi p)) / 2, with p from 0 after warm-up to 1 at max_steps.
    wsd: constant, then decays linearly over the last decay_fraction of all steps (Hu et al. 2024, arXiv 2404.06395).
    constant: stays at the peak.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        passed = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
        return final + (peak - final) * (1 + math.cos(math.pi * min(1.0, passed))) / 2
    decay_steps = min(round(config.decay_fraction * max_steps), max_steps - config.warmup_steps)
    left = (max_steps - step) / max(1, decay_steps)
    return final + (peak - final) * min(1.0, max(0.0, left))
