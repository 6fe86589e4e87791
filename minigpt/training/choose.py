"""What the machine decides: number format and compilation, measured or known, settled once and said with the reason."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from minigpt.terminal import notice
from minigpt.training.config import TrainConfig


def choose(config: TrainConfig) -> TrainConfig:
    """The config with trainer.precision and trainer.compile decided."""
    trainer = config.trainer
    if trainer.precision == "auto":
        precision, why = pick_precision(config)
        notice(f"precision {precision}: {why}")
        trainer = replace(trainer, precision=precision)  # type: ignore[arg-type]
    if trainer.compile is None:
        trainer = replace(trainer, compile=False)
    return replace(config, trainer=trainer)


def pick_precision(config: TrainConfig) -> tuple[str, str]:
    """bf16-mixed where its matrix products are faster, 32-true elsewhere, and why."""
    import torch

    if config.trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU has bfloat16 units"
        return "32-true", "this GPU has no bfloat16 units"
    if config.trainer.accelerator == "mps" or (
        config.trainer.accelerator == "auto" and torch.backends.mps.is_available()
    ):
        return "32-true", "the steadier one on mps"
    seconds = {dtype: product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    faster = "bf16-mixed" if ratio > 1.5 else "32-true"
    return faster, f"on this CPU bfloat16 matrix products run at {ratio:.2g} times the speed of float32"


def product_seconds(dtype: object, rows: int = 2048, width: int = 512, rounds: int = 5) -> float:
    """Median seconds of one matrix product (rows x width by width x width) in this dtype, on the CPU."""
    import torch

    a, b = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)  # type: ignore[call-overload]
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
