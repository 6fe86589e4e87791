"""The learning rate as a function of the step; nothing has to be saved.

A schedule is a function (step, max_steps, settings) -> share: 1 is the peak rate, 0 the final one. It is called for the
steps after the warm-up; step 0 is the first of max_steps steps.
"""

from __future__ import annotations

import math

from minigpt.training.config import SCHEDULES, OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Learning rate of step `step` (0 is the first of `max_steps` steps).

    The warm-up rises linearly and reaches the peak at step warmup_steps; after that the schedule decides.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    share = SCHEDULES.bound(config.schedule, config.own("schedule"))(step, max_steps, config)
    return final + (peak - final) * share


def cosine(step: int, max_steps: int, settings: OptimizerConfig) -> float:
    """(1 + cos(pi p)) / 2, with p from 0 (end of the warm-up) to 1 (max_steps)."""
    passed = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, passed))) / 2


def wsd(step: int, max_steps: int, settings: OptimizerConfig) -> float:
    """Constant, then linear decay over the last decay_fraction of all steps (Hu et al. 2024, arXiv 2404.06395)."""
    decay_steps = min(round(settings.decay_fraction * max_steps), max_steps - settings.warmup_steps)
    left = (max_steps - step) / max(1, decay_steps)
    return min(1.0, max(0.0, left))


def constant(step: int, max_steps: int, settings: OptimizerConfig) -> float:
    """The peak rate to the end."""
    return 1.0
