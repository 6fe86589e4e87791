"""What a step frees stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minigpt.training.allocator import keep_freed_memory

CODE = """
import resource, sys, torch
from minigpt.training.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):  # a few of several megabytes at once, as a step has them
        kept = [torch.ones(1 << 20) for _ in range(5)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_memory_that_is_used_again_costs_no_page_faults() -> None:
    probe = subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL(None).mallopt"], capture_output=True)
    if sys.platform != "linux" or probe.returncode:
        pytest.skip("the C library is not glibc")

    def faults(mode: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout
        )

    assert faults("keep") * 10 < faults("plain")


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
