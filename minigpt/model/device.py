"""Choose the device that a model runs on."""

from __future__ import annotations

from minigpt.errors import ConfigError
from minigpt.terminal import notice


def pick_device(name: str = "auto", float64: bool = False) -> str:
    """Return an available device name; "auto" prefers cuda, then mps, then cpu. Prints a notice if it is not cpu.

    Args:
        name: auto, cpu, cuda (cuda:1) or mps.
        float64: whether the work needs float64 on the device, as the sampler and most studies do. mps does not support
            float64, so "auto" then skips it.

    Raises:
        ConfigError: the device is not available.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in there.items() if here and not (kind == "mps" and float64))
    if not there.get(name.partition(":")[0], False):
        raise ConfigError(
            f"--device {name}: not available; available: {', '.join(kind for kind, here in there.items() if here)}"
        )
    if name != "cpu":
        lacks = ", which does not support float64: operations that need it fail" if name == "mps" and float64 else ""
        notice(f"running on {name}{lacks}; use --device cpu for the CPU")
    return name


def told(error: Exception) -> tuple[str, int] | None:
    """One-line message and exit code for an error raised by the device; None for other errors."""
    if isinstance(error, TypeError) and "MPS" in str(error) and "float64" in str(error):
        return "--device mps: does not support float64, which this command needs; use --device cpu", 2
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of device memory ({str(error).partition('. ')[0]}); use --device cpu, or a smaller batch or length",
            9,
        )
    return None
