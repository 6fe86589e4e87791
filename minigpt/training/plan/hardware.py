"""Peak FLOPs and memory of a machine, and the memory that a process has used."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

T = 1e12
GIB = 2**30
GROW_UNTIL = 0.01  # seconds of one product, after which measured_peak tries no larger size


@dataclass(frozen=True)
class Accelerator:
    """A device from its vendor's data sheet. Rates are dense (no sparsity), in FLOPs per second."""

    name: str
    pattern: str
    """Regular expression that matches torch's name of the device."""
    bf16: float | None
    """Rate of bfloat16 matrix units with float32 accumulation; None if the device has none."""
    fp32: float
    """Rate of float32 outside the matrix units, which 32-true uses."""
    memory: float
    """Bytes of device memory; of the largest variant if there are several."""

    def peak(self, precision: str) -> float | None:
        """FLOPs per second in a trainer.precision; None where the device has no such units."""
        return self.bf16 if precision == "bf16-mixed" else self.fp32


# NVIDIA's data sheets and the architecture papers of the GeForce cards; Apple's figures for its 8- and 32-core GPUs.
ACCELERATORS = (
    Accelerator("H200", r"\bH200\b(?!.*NVL)", 989.5 * T, 67 * T, 141 * 1e9),
    Accelerator("H100 NVL", r"\bH100 NVL\b", 835 * T, 60 * T, 94 * 1e9),
    Accelerator("H100 PCIe", r"\bH100 PCIe\b", 756 * T, 51 * T, 80 * 1e9),
    Accelerator("H100", r"\bH100\b(?! NVL| PCIe)", 989.5 * T, 67 * T, 80 * 1e9),
    Accelerator("A100", r"\bA100\b", 312 * T, 19.5 * T, 80 * 1e9),
    Accelerator("L40S", r"\bL40S\b", 362 * T, 91.6 * T, 48 * 1e9),
    Accelerator("L4", r"\bL4\b", 121 * T, 30.3 * T, 24 * 1e9),
    Accelerator("A10", r"\bA10\b", 125 * T, 31.2 * T, 24 * 1e9),
    Accelerator("T4", r"\bT4\b", None, 8.1 * T, 16 * 1e9),
    Accelerator("RTX 4090", r"\bRTX 4090\b(?! Laptop| D)", 165.2 * T, 82.6 * T, 24 * GIB),
    Accelerator("RTX 3090", r"\bRTX 3090\b(?! Ti)", 71 * T, 35.6 * T, 24 * GIB),
    Accelerator("Apple M1", r"\bApple M1$", None, 2.6 * T, 16 * GIB),
    Accelerator("Apple M1 Max", r"\bApple M1 Max$", None, 10.4 * T, 64 * GIB),
)


def accelerator_named(device_name: str) -> Accelerator | None:
    """Look up a device by its name from torch.cuda.get_device_name; None if the table has no entry."""
    return next((entry for entry in ACCELERATORS if re.search(entry.pattern, device_name)), None)


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOPs per second that matrix products reach at best: measured on a CPU, from the table on a GPU, nan if unknown.

    Args:
        device: the device to train on.
        precision: trainer.precision, "32-true" or "bf16-mixed".
    """
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if precision == "bf16-mixed" else torch.float32, torch.get_num_threads())
    if device.type == "cuda":
        entry = accelerator_named(torch.cuda.get_device_name(device))
        return (entry and entry.peak(precision)) or float("nan")
    return float("nan")


@cache
def measured_peak(dtype: torch.dtype, threads: int) -> float:
    """FLOPs per second of the fastest of a few square matrix products on this CPU; takes about a tenth of a second.

    Takes about a tenth of a second. Sizes grow until a product takes longer than GROW_UNTIL: on a CPU without units for
    the dtype, large products take seconds.

    Args:
        dtype: dtype of both factors.
        threads: torch's current number of threads; the result is cached per number.
    """
    best = 0.0
    for size in (64, 128, 256, 512, 1024):
        seconds = min(_product(dtype, size) for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
        if size >= 256 and seconds > GROW_UNTIL:
            break
    return best


@cache
def bfloat16_gain(threads: int) -> float:
    """Speed of a bfloat16 matrix product on this CPU, as a multiple of the float32 speed.

    The measurement alternates between both dtypes and takes the fastest time of each, so that other load on the machine
    does not decide the result.

    Args:
        threads: torch's current number of threads; the result is cached per number.
    """
    rounds = [(_product(torch.float32, 256), _product(torch.bfloat16, 256)) for _ in range(8)]
    wide, narrow = (min(seconds) for seconds in zip(*rounds, strict=True))
    return wide / narrow


def _product(dtype: torch.dtype, size: int) -> float:
    """Time of one square matrix product in seconds."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = torch.ones(size, size, dtype=dtype)
    began = time.perf_counter()
    torch.matmul(a, b, out=out)
    return time.perf_counter() - began


def machine_memory() -> int | None:
    """Bytes of physical memory, or the container's (cgroup) limit if that is lower; None if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or the value "max"
            continue
    return total


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far in bytes: of tensors on a GPU, else resident memory of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # preferred to getrusage, which also counts the parent process
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
