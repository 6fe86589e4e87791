"""What every test shares: few threads (the models are tiny), no network, no GPU, a limit, three presets at toy size.

GPUs are hidden, so that the tests are the same everywhere: they compare numbers of a CPU, and they fork, which CUDA
does not survive. MINIGPT_TEST_DEVICE=cuda shows them and runs the tests marked gpu alone; cpu tries those tests
without one.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

os.environ.update({} if os.environ.get("MINIGPT_TEST_DEVICE") else {"CUDA_VISIBLE_DEVICES": ""})  # before torch looks
os.environ["PYTHONFAULTHANDLER"] = "1"  # programs that a test starts write their stacks when it is out of time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # torch asks for names; nobody may answer
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pytest
import torch

from forks import limited

torch.set_num_threads(1)

DEVICE = os.environ.get("MINIGPT_TEST_DEVICE")


terminal = pytest.StashKey[int]()  # what is stderr before pytest captures it


def pytest_configure(config: pytest.Config) -> None:
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        config.stash[terminal] = os.dup(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DEVICE:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
    for item in items:
        if item.get_closest_marker("gpu") and not DEVICE:
            item.add_marker(pytest.mark.skip(reason="GPUs are hidden; MINIGPT_TEST_DEVICE=cuda runs this"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with limited(item.nodeid, last_words=item.config.stash[terminal]):
        return (yield)


@pytest.fixture(autouse=True)
def _prefers_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """With MINIGPT_TEST_BF16=1, `precision: auto` takes bf16-mixed, as on a CPU with units for it.

    A test that passes on one kind of machine alone shows here: what needs float32 has to say so.
    """
    if os.environ.get("MINIGPT_TEST_BF16") == "1":
        monkeypatch.setattr("minigpt.training.plan.choose.WORTH", 0.0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine is a failure, not a wait."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
