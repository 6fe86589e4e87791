"""Launch several processes on this machine as torchrun does; watch them, forward signals, end them together.

Other launchers kill processes after fixed times: Lightning's kills the first process within 5 seconds of the end of any
other, even during a save; torch's elastic agent kills processes that have not exited 30 seconds after a signal. This
launcher sets no time limit after a request to stop. Only after a failure must the others exit within LEAVE_SECONDS.
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

LEAVE_SECONDS = 20.0  # time for the other processes to finish a save and exit after one was lost
POLL_SECONDS = 0.05


def search_path() -> dict[str, str]:
    """Environment variables with which a child process finds minigpt in a repository, from any current folder."""
    root = Path(__file__).parents[3]
    if not (root / "train.py").is_file():  # minigpt is installed
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}


class Processes:
    """`count` processes with the same command; a context manager that ends all of them on exit.

    They meet at a store in this process (at a free TCP port chosen by the system). Ctrl-C and SIGTERM are forwarded as
    SIGTERM; SIGUSR1 is forwarded; a second Ctrl-C kills all processes immediately. Each process has its own session, so
    that a Ctrl-C in the terminal reaches it only once, through this process.

    Attributes:
        received: the signal that requested the stop; 0 for none.
        failures: rank -> exit code (negative: number of the signal that killed it), in the order in which they ended.
        store: the store at which they meet.
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
        if posix:  # children inherit "ignore", so an early SIGUSR1 does not kill a child that has no handler yet
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
                pass_fds=tuple(held) if posix else (),  # the run stays locked as long as one of them lives
            )
        # Open the store only now: its server is a thread, and processes should not be forked while it runs.
        self.store = store_of_one_start(serve(self._listening))
        if self.received:  # a signal arrived while the processes were started
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
        """Wait until all processes have ended.

        After a failure the others have LEAVE_SECONDS to exit, or a quarter of that if no process was lost.
        """
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
        """(rank, exit code) of the failure that caused the rest: a killed process, else an error, else a lost peer."""
        failed = [(rank, code) for rank, code in self.failures.items() if not self._orderly(code)]
        lost = DistributedError.exit_code
        return min(failed, key=lambda item: (item[1] > 0, item[1] == lost), default=None)

    def stopped_by(self) -> signal.Signals | None:
        """The signal after which the processes stopped as requested, or None."""
        if self.failures and self.cause() is None:
            return signal.Signals(self.received or next(iter(self.failures.values())) - 128)
        return signal.Signals(self.received) if self._killed and self.received else None

    def how_it_ended(self, cause: tuple[int, int]) -> str:
        """Describe a cause from `cause`; a hang that the processes found themselves takes precedence."""
        if self.store.check([VERDICT]):
            hanging = json.loads(self.store.get(VERDICT))["hanging"]
            return f"process {', '.join(map(str, hanging))} hung and was stopped"
        rank, code = cause
        if code > 0:
            return f"process {rank} ended (exit code {code})"
        hint = ", possibly because the machine ran out of memory" if code == -9 else ""
        return f"process {rank} ended (killed by {signal.Signals(-code).name}{hint})"

    def _orderly(self, code: int) -> bool:
        """Whether an exit code is that of a process that stopped on request."""
        agreed = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # also if only one process received the signal
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
