"""Connecting the processes of a run: the launcher's store, the process group, and a check that all processes were
started with the same configuration and code.

The store is a small key-value server. It only transports JSON; nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minigpt.durable import canonical_json
from minigpt.errors import DistributedError
from minigpt.terminal import notice

T = TypeVar("T")
LOCAL = "127.0.0.1"
# Environment variables that torchrun sets in each process.
STARTED_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Time limit for all processes to connect: machines may start minutes apart and read their code from a shared disk.
JOIN_SECONDS = 300.0
UNEASY_SECONDS = 15.0  # after this time, a notice says what the process waits for
# Timeout of collectives and the store: preparing a corpus or saving may take hours, and watch.py finds hangs.
PATIENCE = timedelta(days=30)
_opened: dict[int, dist.TCPStore] = {}  # by port; kept open as long as this process lives


def connect() -> dist.Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT; process 0 opens the store if no launcher did.

    Raises:
        DistributedError: no store answers within JOIN_SECONDS, or the port is in use.
    """
    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    opens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == "0"

    def reach() -> dist.Store:
        if opens and port not in _opened:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            _opened[port] = serve(socket.create_server(("", port), family=family))
        return dist.TCPStore(host, port, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False)

    try:  # torch itself would wait forever if something other than a store listens there
        store = within(JOIN_SECONDS, f"the others at {host}:{port}", reach)
    except (OSError, RuntimeError, ValueError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise DistributedError(
            f"process {rank} cannot meet the others at {host}:{port} "
            f"({'the port is in use' if taken else 'no store answers there'}); check MASTER_ADDR and "
            f"MASTER_PORT, or choose another --master_port"
        ) from error
    store.set_timeout(PATIENCE)
    return store_of_one_start(store)


def within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """Run `work()` in a thread and return its result; after UNEASY_SECONDS a notice says what the process waits for.

    Raises:
        TimeoutError: `work` took longer than `seconds`; its thread keeps running.
        Exception: whatever `work` raised.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], min(UNEASY_SECONDS, seconds)).done and seconds > UNEASY_SECONDS:
        notice(f"process {os.environ['RANK']}: waiting for {what}, up to {seconds:.0f} s")
        wait([answer], seconds - UNEASY_SECONDS)
    if not answer.done():
        raise TimeoutError(f"{what}: no answer within {seconds:.0f} s")
    return answer.result()


def listen() -> socket.socket:
    """Open a socket for the store, on localhost only, at a free port chosen by the system.

    Connections wait until `serve` opens the store.
    """
    return socket.create_server((LOCAL, 0))


def serve(listening: socket.socket) -> dist.TCPStore:
    """Open the store at a listening socket, which it takes over.

    minigpt opens the socket itself because torch's would also listen on IPv6. torch's server looks up the host name of
    each client; if /etc/hosts lacks the IPv6 form of its IPv4 address and the name server does not answer, every
    connection blocks the store for seconds.
    """
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": LOCAL, "::": "::1"}.get(host, host)
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def store_of_one_start(store: dist.Store) -> dist.Store:
    """The namespace of minigpt in the store; it differs per restart, so a restarted group reads no old keys."""
    return dist.PrefixStore(f"minigpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def join(store: dist.Store, on_gpu: bool) -> None:
    """Join the process group that exchanges gradients.

    Raises:
        DistributedError: the other processes have not joined within JOIN_SECONDS.
    """
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = dist.PrefixStore("group", store)
    backend = "nccl" if on_gpu else "gloo"

    def meet() -> None:  # this timeout also applies to all later collectives
        dist.init_process_group(backend, store=group, rank=rank, world_size=world_size, timeout=PATIENCE)

    try:
        within(JOIN_SECONDS, f"the other processes to join the {backend} group", meet)
    except TimeoutError as error:
        raise DistributedError(
            f"process {rank}: the other processes have not joined the {backend} group within {JOIN_SECONDS:.0f} s; see "
            f"their messages, check the network between the machines, and restart all of them"
        ) from error


def agree(store: dist.Store, what: str, values: dict[str, Any]) -> None:
    """Check that a flat dict of plain values is the same in every process.

    Args:
        store: the shared store.
        what: a unique name of this comparison.
        values: must be equal in all processes.

    Raises:
        DistributedError: raised in every process, with the names and values in which the first differing process
            differs; or a process has not connected within JOIN_SECONDS.
    """
    with lost_store():
        store.set(f"{what}/{os.environ['RANK']}", canonical_json({"host": platform.node(), "values": values}))
        first, *others = [_said(store, f"{what}/{rank}", rank) for rank in range(int(os.environ["WORLD_SIZE"]))]
    for rank, other in enumerate(others, start=1):
        names = dict.fromkeys([*first["values"], *other["values"]])
        pairs = {name: (first["values"].get(name), other["values"].get(name)) for name in names}
        different = [
            f"{name} {theirs!r} (process 0: {ours!r})" for name, (ours, theirs) in pairs.items() if theirs != ours
        ]
        if different:
            raise DistributedError(
                f"process {rank} on {other['host']} was started with another {what} than process 0 on {first['host']}: "
                f"{', '.join(different)}; start all processes with the same command and the same files"
            )


def _said(store: dist.Store, key: str, rank: int) -> dict[str, Any]:
    try:
        store.wait([key], timedelta(seconds=JOIN_SECONDS))
    except dist.DistStoreError as error:
        raise DistributedError(
            f"process {rank} has not connected within {JOIN_SECONDS:.0f} s; see its messages, and restart all processes"
        ) from error
    return json.loads(store.get(key))


def tell(store: dist.Store, values: dict[str, Any] | None) -> dict[str, Any]:
    """Broadcast a dict from process 0: it passes the values, the others pass None; all return the values.

    The others wait without a time limit.

    Raises:
        DistributedError: the connection to the store is lost.
    """
    with lost_store():
        if values is not None:
            store.set("told", canonical_json(values))
        else:
            with suppress(dist.DistStoreError):
                store.wait(["told"], timedelta(seconds=UNEASY_SECONDS))
            if not store.check(["told"]):
                notice(f"process {os.environ['RANK']}: waiting for process 0, which prepares the run")
        return json.loads(store.get("told"))


@contextmanager
def lost_store() -> Iterator[None]:
    """Context manager: turn a lost connection to the store into a DistributedError."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise DistributedError(
            f"process {os.environ['RANK']} has lost the connection to the store at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: its process has ended; see its messages, and restart all processes"
        ) from error


def code_identity() -> dict[str, str]:
    """Identify the code of this process: a hash of minigpt's files, and the versions of Python, torch and lightning."""
    import lightning

    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return {
        "minigpt's files": digest.hexdigest()[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
