"""The launcher of several processes, with small programs in place of training."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from minigpt.durable import locked
from minigpt.errors import ConfigError
from minigpt.training.processes import processes
from minigpt.training.processes.processes import Processes

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them"),
]

# What each of them runs: RANK is known, `ready()` says so to the test, `wait()` sleeps until a signal ends it.
PRELUDE = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), sys.argv[1]
def ready(): open(f"{folder}/{rank}", "w").close()
def wait(): time.sleep(3600)
"""


def started(program: str, folder: Path, count: int = 2) -> Processes:
    return Processes([sys.executable, "-c", PRELUDE + program, str(folder)], count, "test")


def when_ready(folder: Path, count: int, then, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something, once, from within the launcher's waiting, as soon as so many are ready."""
    real, done = processes.time.sleep, []

    def sleep(seconds: float) -> None:
        real(seconds)
        if not done and len(list(folder.iterdir())) >= count:
            done.append(1)
            then()

    monkeypatch.setattr(processes.time, "sleep", sleep)


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def test_all_that_end_well_leave_no_cause(tmp_path: Path) -> None:
    with started("assert os.environ['WORLD_SIZE'] == '3'; ready()", tmp_path, 3) as group:
        group.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}
    assert group.cause() is None and group.stopped_by() is None


def test_one_that_is_killed_is_named_though_others_fail_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 3600)
    program = """
if rank == 2:
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(8 if rank == 0 else 1)  # lost another; some error
"""
    with started(program, tmp_path, 3) as group:
        group.wait()
    assert group.cause() == (2, -9)
    assert "process 2 ended (killed by SIGKILL" in group.how_it_ended((2, -9))


def test_an_error_is_named_before_the_losses_it_caused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 3600)
    with started("time.sleep(0.3 * (rank == 1)); sys.exit([8, 6][rank])", tmp_path) as group:
        group.wait()
    assert group.cause() == (1, 6)
    assert group.how_it_ended((1, 6)) == "process 1 ended (exit code 6)"


def test_those_that_do_not_leave_after_a_failure_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0.3)
    program = """
if rank == 1: sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
wait()
"""
    with started(program, tmp_path) as group:
        group.wait()
    assert group.failures == {1: 7}
    assert group.cause() == (1, 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_as_sigterm_and_nobody_is_hurried(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0.1)
    program = """
def stop(number, frame):
    time.sleep(0.5 * (rank == 0))  # it saves
    open(f"{folder}/stopped-{rank}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
ready()
wait()
"""
    when_ready(tmp_path, 2, send(number), monkeypatch)
    with started(program, tmp_path) as group:
        group.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "stopped-0", "stopped-1"}
    assert group.cause() is None
    assert group.stopped_by() == number


def test_a_signal_before_they_listen_ends_them_without_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when_ready(tmp_path, 2, send(signal.SIGTERM), monkeypatch)
    with started("ready(); wait()", tmp_path) as group:
        group.wait()
    assert group.failures == {0: -15, 1: -15}
    assert group.cause() is None and group.stopped_by() == signal.SIGTERM


def test_a_second_ctrl_c_kills_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); wait(); open(f'{folder}/late', 'w')"

    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    when_ready(tmp_path, 2, twice, monkeypatch)
    with started(program, tmp_path) as group:
        group.wait()
    assert group.cause() is None and group.stopped_by() == signal.SIGINT
    assert not (tmp_path / "late").exists()


def test_sigusr1_is_passed_on_and_harms_nobody_who_does_not_listen_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
if rank == 0:
    signal.signal(signal.SIGUSR1, lambda *_: open(f"{folder}/heard", "w").close())
ready()
while not os.path.exists(f"{folder}/heard"): time.sleep(0.02)
"""
    when_ready(tmp_path, 2, send(signal.SIGUSR1), monkeypatch)
    with started(program, tmp_path) as group:
        group.wait()
    assert group.failures == {}
    assert (tmp_path / "heard").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_they_are_started_ends_all_of_them(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = processes.subprocess.Popen

    def popen(*arguments, **options):
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    with started("wait()", tmp_path) as group:
        group.wait()
    assert not group._running
    assert group.cause() is None and group.stopped_by() == number


def test_they_find_minigpt_wherever_they_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with started("import minigpt", tmp_path) as group:
        group.wait()
    assert group.failures == {}


def test_a_folder_stays_locked_as_long_as_one_of_them_lives(tmp_path: Path) -> None:
    """Also where this process is killed: nobody begins the same run while they still save it."""
    marks = tmp_path / "marks"
    marks.mkdir()
    child = os.fork()
    if child == 0:
        with (
            locked(tmp_path),
            started(f"ready()\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.02)", marks),
        ):
            while len(list(marks.iterdir())) < 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(ConfigError, match=rf"in use by process {child} on"), locked(tmp_path):
        pass
    (tmp_path / "go").touch()
    while True:  # they end, and let go
        with suppress(ConfigError), locked(tmp_path):
            return
        time.sleep(0.02)


def test_their_store_is_reached_from_this_machine_alone_and_by_ipv4_alone(tmp_path: Path) -> None:
    """By IPv6 its server would ask a name server about each connection, and wait for one that does not answer."""
    program = """
import socket, torch.distributed as dist
port = int(os.environ["MASTER_PORT"])
assert dist.TCPStore("127.0.0.1", port, wait_for_workers=False).add("one", 1) > 0
try:
    socket.create_connection(("::1", port))
    sys.exit(1)
except OSError:
    pass
"""
    with started(program, tmp_path) as group:
        group.wait()
    assert group.failures == {}


def test_signals_are_as_before_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with started("pass", tmp_path) as group:
        group.wait()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_an_error_in_the_launcher_leaves_no_process_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), started("wait()", tmp_path) as group:
        pids = [process.pid for process in group._running.values()]
        raise RuntimeError
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
