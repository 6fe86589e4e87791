"""Processes of the tests: forks of this one, which spare the seconds that imports take, and an end for whatever hangs.

A fork has only the thread that forked, and a lock that another thread held stays locked in it for ever. The server of a
store is such a thread: it looks up the name of whoever connects, under a lock of the C library (resolv_conf.c) that a
fork needs for its own connection. So everything is forked before the store of its processes is opened.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from minigpt.errors import leave
from minigpt.training.processes.join import LOCAL, listen, serve

# What a test may take, on a machine that does much else. Ten times what the slowest takes on one that does not.
LIMIT = 300.0


class Fork:
    """A fork of this process that calls `target()` and ends with what it gives: as Popen is to programs.

    Args:
        target: gives the exit code.
        errors: the file that its stderr goes to; None for that of this process.
        session: give it a session of its own.
    """

    def __init__(self, target: Callable[[], int], errors: Path | None = None, session: bool = False) -> None:
        self.returncode: int | None = None
        self.stopped = False
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            gc.freeze()  # nobody's sockets and threads are ended here
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its pool of threads is not here
            close_sockets()
            if session:
                os.setsid()
            if errors:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                sys.stderr = os.fdopen(2, "w", closefd=False)
            faulthandler.enable(2)
            leave(target())
        finally:
            traceback.print_exc()
            os._exit(99)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """Its exit code, negative for the signal that killed it; None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options | os.WUNTRACED * (options == os.WNOHANG))
            if pid and os.WIFSTOPPED(status):
                self.stopped = True
            elif pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int | None:
        return self.poll(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def close_sockets() -> None:
    """A connection ends when the process that held it does, not when its forks do, too."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode) and int(name) > 2:
                os.close(int(name))


def in_forks(count: int, target: Callable[[int], int]) -> dict[int, int]:
    """Run `target(rank)` in forks of this process that know of each other as torchrun's processes do.

    A fork that is stopped is killed when no other is left.

    Returns:
        rank -> what the target gave; negative for the signal that killed it.
    """
    listening = listen()
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": LOCAL,
        "MASTER_PORT": str(listening.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "forked",
    }

    def as_one_of_many(rank: int) -> int:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        return target(rank)

    forks = [Fork(lambda rank=rank: as_one_of_many(rank)) for rank in range(count)]  # type: ignore[misc]
    store = serve(listening)  # a thread, from here on; connections have waited at the socket
    try:
        while left := [fork for fork in forks if fork.poll() is None]:
            if all(fork.stopped for fork in left):
                break
            time.sleep(0.01)
    finally:
        for fork in forks:
            fork.kill()
        codes = {rank: fork.wait() for rank, fork in enumerate(forks)}
        del store
    return codes  # type: ignore[return-value]


def running() -> dict[int, int]:
    """Process id -> its parent's, of all that have not ended (Linux; elsewhere none are found)."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if not fields["State"].startswith("Z"):
                found[int(status.parent.name)] = int(fields["PPid"])
    return found


def children_of(parent: int) -> list[int]:
    """Process ids of the living children of a process."""
    return [pid for pid, its_parent in running().items() if its_parent == parent]


def descendants_of(parent: int) -> list[int]:
    """Children, their children, and so on."""
    children = children_of(parent)
    return children + [pid for child in children for pid in descendants_of(child)]


@contextmanager
def limited(what: str, seconds: float = LIMIT, last_words: int = 2) -> Iterator[None]:
    """A `with` block that fails when it takes longer, wherever it waits, and leaves no process behind.

    Each process that this one started, and each of theirs, writes the stacks of its threads to its stderr as it is
    killed, by SIGABRT: forks are prepared for it, and Python's programs by PYTHONFAULTHANDLER. Then this process writes
    its own, and the block raises. Where native code keeps it from that, it ends a minute later, with its stacks.

    Args:
        what: a name for the message.
        seconds: the limit.
        last_words: the file descriptor for the stacks of a process that can only end.
    """
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return

    def too_long(number: int, frame: FrameType | None) -> None:
        left = set(descendants_of(os.getpid()))
        for how in (signal.SIGABRT, signal.SIGCONT, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            rounds = 100 * (how == signal.SIGCONT)
            while rounds and left & set(running()):  # they write
                rounds -= 1
                time.sleep(0.05)
        faulthandler.dump_traceback(2)
        pytest.fail(f"{what} took longer than {seconds:g} s; the stacks of its {len(left) + 1} processes are in stderr")

    handler, (remaining, _) = signal.signal(signal.SIGALRM, too_long), signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 60, exit=True, file=last_words)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, handler)
