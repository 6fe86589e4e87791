"""The device that a model runs on: choosing it, its free memory, its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.errors import ConfigError, MemoryExceeded
from minigpt.terminal import notice

if TYPE_CHECKING:
    import torch


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


# The last is oneDNN's; "could not create a primitive descriptor" is something else.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "could not create a primitive\n")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or torch means that memory ran out."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in f"{error}\n" for text in _OUT_OF_MEMORY)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Context manager: turn out-of-memory errors of Python and torch into MemoryExceeded.

    Raises:
        MemoryExceeded: with `advice` in its message.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExceeded(f"out of memory {advice}") from error


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process can still allocate on a device; None if the system does not tell.

    On a CPU the least of: available memory, what the process's control group leaves, what its address space leaves.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    limits = [_available(), _left_in_group(), _left_in_address_space()]
    return min((limit for limit in limits if limit is not None), default=None)


def _fields(path: str) -> dict[str, int]:
    """The lines "name: N kB" of a file of /proc, in bytes; empty where there is no such file."""
    found = {}
    with suppress(OSError, ValueError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0]) * 1024
    return found


def _available() -> int | None:
    return _fields("/proc/meminfo").get("MemAvailable")


def _left_in_group() -> int | None:
    with suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    return None  # no limit ("max"), or another system


def _left_in_address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _fields("/proc/self/status").get("VmSize")
    return limit - used if limit != resource.RLIM_INFINITY and used is not None else None


def release_memory() -> None:
    """Return freed memory to the system: the C library keeps fragments, and what it keeps counts as used."""
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # glibc alone has this function
        ctypes.CDLL(None).malloc_trim(0)
