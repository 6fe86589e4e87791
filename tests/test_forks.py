"""The tests' own processes: none can keep a test waiting, and each says where it stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import forks
from forks import Fork, children_of, in_forks, limited
from minigpt.training.processes import processes
from minigpt.training.processes.processes import Processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up as on Linux")


def out_of_time() -> None:
    """In a child: let the time of the test that waits for it be over now, as the timer would."""
    os.kill(os.getppid(), signal.SIGALRM)


def test_forks_that_hang_are_ended_with_their_stacks(capfd: pytest.CaptureFixture) -> None:
    def hang_in_a_thread_too(rank: int) -> int:
        def a_thread_of_it() -> None:
            out_of_time()
            threading.Event().wait()

        if rank == 1:
            threading.Thread(target=a_thread_of_it).start()
        threading.Event().wait()
        return 0

    expected = "some test took longer than 900 s; the stacks of its 3 processes"
    with pytest.raises(pytest.fail.Exception, match=expected), limited("some test", 900):
        in_forks(2, hang_in_a_thread_too)
    assert not children_of(os.getpid())
    said = capfd.readouterr().err
    assert "a_thread_of_it" in said
    assert said.count("hang_in_a_thread_too") == 2
    assert "test_forks_that_hang_are_ended_with_their_stacks" in said  # this process's own


def test_programs_that_hang_and_what_they_start_are_ended_with_their_stacks(capfd: pytest.CaptureFixture) -> None:
    """Also one that is stopped, and one that this process waits for with wait()."""
    code = """
import os, signal, sys, time
def its_child(): os.kill(os.getpid(), signal.SIGSTOP)
def its_parent():
    os.waitpid(child, os.WUNTRACED)
    os.kill(os.getppid(), signal.SIGALRM)
    while True: time.sleep(3600)
child = os.fork()
its_parent() if child else its_child()
"""
    with pytest.raises(pytest.fail.Exception, match="its 3 processes"), limited("some test", 900):
        subprocess.Popen([sys.executable, "-c", code]).wait()
    assert not children_of(os.getpid())
    said = capfd.readouterr().err
    assert "in its_child" in said and "in its_parent" in said


def test_the_limit_of_a_test_goes_on_after_one_within_it() -> None:
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    assert before > 0  # tests/conftest.py set it
    handler = signal.getsignal(signal.SIGALRM)
    with limited("a part", 900):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > before
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= before
    assert signal.getsignal(signal.SIGALRM) is handler


def test_nothing_is_forked_beside_the_server_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def noted(name: str, real: Callable) -> Callable:
        def call(*arguments, **options):
            done.append(name)
            return real(*arguments, **options)

        return call

    for home, name in ((os, "fork"), (forks, "serve"), (processes.subprocess, "Popen"), (processes, "serve")):
        monkeypatch.setattr(home, name, noted(name, getattr(home, name)))
    assert in_forks(2, lambda rank: 0) == {0: 0, 1: 0}
    with Processes([sys.executable, "-c", ""], 2, "test") as group:
        group.wait()
    assert done == ["fork", "fork", "serve", "Popen", "Popen", "serve"]


def test_a_stopped_fork_is_ended_once_it_alone_is_left() -> None:
    def target(rank: int) -> int:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)
        return 3

    assert in_forks(3, target) == {0: 3, 1: -9, 2: 3}


def test_a_fork_holds_no_connection_of_this_process() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.fileno()

        def closed() -> int:
            try:
                os.fstat(number)
            except OSError:
                return 0
            return 1

        assert Fork(closed).wait() == 0


def test_gpus_are_hidden() -> None:
    import torch

    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
