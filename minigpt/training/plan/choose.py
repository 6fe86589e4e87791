"""Resolve trainer.precision "auto" for this device, and report the choice with its reason."""

from __future__ import annotations

from dataclasses import replace

from minigpt.terminal import notice
from minigpt.training.config import TrainConfig

WORTH = 1.5  # minimum speedup of bfloat16 matrix products, since converting to bfloat16 takes time too


def choose(config: TrainConfig) -> TrainConfig:
    """Return the config with trainer.precision resolved."""
    trainer = config.trainer
    if trainer.precision == "auto":
        precision, why = pick_precision(config)
        notice(f"precision {precision}: {why}")
        trainer = replace(trainer, precision=precision)  # type: ignore[arg-type]
    return replace(config, trainer=trainer)


def pick_precision(config: TrainConfig) -> tuple[str, str]:
    """Choose bf16-mixed if its matrix products are faster, else 32-true. Returns the precision and the reason."""
    import torch

    from minigpt.training.plan.hardware import bfloat16_gain

    if config.trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU has bfloat16 units"
        return "32-true", "this GPU has no bfloat16 units"
    if config.trainer.accelerator == "mps" or (
        config.trainer.accelerator == "auto" and torch.backends.mps.is_available()
    ):
        return "32-true", "the more stable choice on mps"
    threads = config.trainer.threads or torch.get_num_threads()
    ratio = bfloat16_gain(threads)
    faster = "bf16-mixed" if ratio > WORTH else "32-true"
    return faster, f"on this CPU bfloat16 matrix products run at {ratio:.2g} times the speed of float32"
