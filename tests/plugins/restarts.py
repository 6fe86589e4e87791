"""A schedule: a cosine with restarts (Loshchilov & Hutter 2016, arXiv 1608.03983)."""

import math

import minigpt


@minigpt.register("schedule", "restarts", help="a cosine that starts again")
def restarts(step, max_steps, settings, *, cycles: int = 2):
    passed = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    return (1 + math.cos(math.pi * (passed * cycles % 1))) / 2
