"""Launch several processes on this machine as torchrun does; watch them, forward signals, end them together.

torch's own launchers end the others at fixed times: Lightning's kills the first process within 5 seconds of any other's
end, even in the middle of a save; torch's elastic agent kills what has not left 30 seconds after a signal. Here nobody
who was asked to stop is hurried, and only after a failure do the rest have LEAVE_SECONDS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType, TracebackType

from minigpt.durable import held
from minigpt.errors import DistributedError
from minigpt.training.processes.join import LOCAL, listen, serve, store_of_one_start
from minigpt.training.processes.watch import VERDICT

LEAVE_SECONDS = 20.0  # that the others have, after one was lost, to finish a save and leave by themselves
POLL_SECONDS = 0.05


def search_path() -> dict[str, str]:
    """What lets a child process find minigpt in a repository, wherever train.py was called from."""
    root = Path(__file__).parents[3]
    if not (root / "train.py").is_file():  # it is installed
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}


class Processes:
    """`count` processes with one command; a context manager that leaves none behind.

    They meet at a store that this process holds (a TCP port of the system's choice, so that none is ever taken). Ctrl-C
    and SIGTERM are passed on, as SIGTERM; SIGUSR1 is passed on; a second Ctrl-C kills all at once. They are in sessions
    of their own: a terminal's Ctrl-C reaches them through this process alone, once.

    Attributes:
        received: the signal that asked all of them to stop; 0 for none.
        failures: rank -> exit code, negative for the signal that killed it, in the order they ended.
        store: what they meet at.
    """

    def __init__(self, command: list[str], count: int, name: str) -> None:
        self._listening = listen()
        self.received = 0
        self.failures: dict[int, int] = {}
        self._command, self._count, self._name = command, count, name
        self._running: dict[int, subprocess.Popen] = {}
        self._killed: set[int] = set()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Processes:
        port = self._listening.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(self._count),
            "LOCAL_WORLD_SIZE": str(self._count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": LOCAL,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": self._name,
            "TORCHELASTIC_RESTART_COUNT": "0",
            **search_path(),
        }
        posix = os.name == "posix"
        if posix:  # what is ignored stays ignored in a child: it can be asked to save before it listens
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        for rank in range(self._count):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._running[rank] = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=posix,
                pass_fds=tuple(held) if posix else (),  # the lock on the run, for as long as one of them lives
            )
        # Not before: its server is a thread, which should not be there when a process is forked.
        self.store = store_of_one_start(serve(self._listening))
        if self.received:  # while they were started
            self._send(signal.SIGTERM)
        if posix:
            signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._send(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        for process in self._running.values():
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Until all have ended. After a failure the rest have LEAVE_SECONDS, a quarter of it if nobody is lost."""
        deadline = float("inf")
        while self._running:
            for rank, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[rank]
                if code and rank not in self._killed:
                    self.failures[rank] = code
                if code and not self._orderly(code):
                    lost = code != DistributedError.exit_code
                    deadline = min(deadline, time.monotonic() + LEAVE_SECONDS * (1 if lost else 0.25))
            if time.monotonic() > deadline:
                self._killed.update(self._running)
                self._send(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
                deadline = float("inf")
            time.sleep(POLL_SECONDS)

    def cause(self) -> tuple[int, int] | None:
        """(rank, exit code) of the failure that the others followed from: a death, then an error, then a loss."""
        failed = [(rank, code) for rank, code in self.failures.items() if not self._orderly(code)]
        lost = DistributedError.exit_code
        return min(failed, key=lambda item: (item[1] > 0, item[1] == lost), default=None)

    def stopped_by(self) -> signal.Signals | None:
        """The signal that ended them in an orderly way, where one did."""
        if self.failures and self.cause() is None:
            return signal.Signals(self.received or next(iter(self.failures.values())) - 128)
        return signal.Signals(self.received) if self._killed and self.received else None

    def how_it_ended(self, cause: tuple[int, int]) -> str:
        """A cause in words; a hang that the processes found themselves comes first."""
        if self.store.check([VERDICT]):
            hanging = json.loads(self.store.get(VERDICT))["hanging"]
            return f"process {', '.join(map(str, hanging))} hung and was ended"
        rank, code = cause
        if code > 0:
            return f"process {rank} ended (exit code {code})"
        hint = ", which a machine out of memory sends, too" if code == -9 else ""
        return f"process {rank} ended (killed by {signal.Signals(-code).name}{hint})"

    def _orderly(self, code: int) -> bool:
        """Whether an exit code is what a process has that was asked to stop."""
        agreed = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # also where one process was signalled by itself
        return code in agreed or (bool(self.received) and code in (-signal.SIGTERM, DistributedError.exit_code))

    def _send(self, number: int) -> None:
        for process in self._running.values():
            process.send_signal(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self._send(number)
        elif number == signal.SIGINT and self.received == signal.SIGINT:
            self._killed.update(self._running)
            self._send(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        else:
            self.received = number
            self._send(signal.SIGTERM)
