"""Choose the device that a model runs on."""

from __future__ import annotations

from minigpt.errors import ConfigError
from minigpt.terminal import notice


def pick_device(name: str = "auto", float64: bool = False) -> str:
    """The device of that name; "auto" is cuda, then mps, then cpu. A notice names one that is not the cpu.

    Args:
        name: auto, cpu, cuda (cuda:1) or mps.
        float64: whether 64-bit numbers are computed on the device, as the sampler and most studies do. mps has none, so
            "auto" passes it over then.

    Raises:
        ConfigError: the machine has no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, here in there.items() if here and not (kind == "mps" and float64))
    if not there.get(name.partition(":")[0], False):
        raise ConfigError(
            f"--device {name}: not here; there is {', '.join(kind for kind, here in there.items() if here)}"
        )
    if name != "cpu":
        lacks = ", which has no 64-bit numbers: where they are needed, this ends" if name == "mps" and float64 else ""
        notice(f"running on {name}{lacks}; use --device cpu for the CPU")
    return name


def told(error: Exception) -> tuple[str, int] | None:
    """What to say of an error that comes from the device, in one line, and the exit code; None for another error."""
    if isinstance(error, TypeError) and "MPS" in str(error) and "float64" in str(error):
        return "--device mps: has no 64-bit numbers, and this computes with them; use --device cpu", 2
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the device's memory is too small ({str(error).partition('. ')[0]}); use --device cpu, or ask for less",
            9,
        )
    return None
