"""How several processes meet: the store that their launcher holds, the process group, and a comparison of what each of
them was started with.

The store is a small server of keys and values. What goes through it is JSON; nothing is unpickled.
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
# What torchrun tells each process that it starts.
STARTED_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Until all are there: the machines of a cluster may begin minutes apart, and read code from a disk that all share.
JOIN_SECONDS = 300.0
UNEASY_SECONDS = 15.0  # after which a line says what is waited for
# For collectives and for the store: preparing a corpus or a save may take hours, and who hangs is watch.py's to say.
PATIENCE = timedelta(days=30)
_opened: dict[int, dist.TCPStore] = {}  # by port: they last as long as this process


def connect() -> dist.Store:
    """A connection to the store at MASTER_ADDR:MASTER_PORT; the first process opens it where no launcher did.

    Raises:
        DistributedError: nothing answers there within JOIN_SECONDS, or the port is taken.
    """
    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    opens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == "0"

    def reach() -> dist.Store:
        if opens and port not in _opened:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            _opened[port] = serve(socket.create_server(("", port), family=family))
        return dist.TCPStore(host, port, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False)

    try:  # torch itself waits without end for somebody who listens there but is no store
        store = within(JOIN_SECONDS, f"the others at {host}:{port}", reach)
    except (OSError, RuntimeError, ValueError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise DistributedError(
            f"process {rank} cannot meet the others at {host}:{port} "
            f"({'the port is taken' if taken else 'nothing answers there as it should'}); check MASTER_ADDR and "
            f"MASTER_PORT, or choose another --master_port"
        ) from error
    store.set_timeout(PATIENCE)
    return store_of_one_start(store)


def within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """What `work()` gives; after UNEASY_SECONDS a line says what is waited for.

    Raises:
        TimeoutError: it took longer than `seconds`; its thread is left behind.
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
        raise TimeoutError(f"{what}: nothing in {seconds:.0f} s")
    return answer.result()


def listen() -> socket.socket:
    """A socket for the store of this machine's processes, at a port of the system's choice; no other reaches it.

    Connections wait at it until `serve` opens the store.
    """
    return socket.create_server((LOCAL, 0))


def serve(listening: socket.socket) -> dist.TCPStore:
    """Open the store at a socket, which it takes over.

    The socket is ours because torch's listens on IPv6, too: its server looks up the name of whoever connects, where
    /etc/hosts does not know an IPv4 address in its IPv6 form, and a name server that does not answer stops the store
    for seconds at each connection.
    """
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": LOCAL, "::": "::1"}.get(host, host)
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def store_of_one_start(store: dist.Store) -> dist.Store:
    """Our part of a store; a group that torchrun restarts does not read what the one before it wrote."""
    return dist.PrefixStore(f"minigpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def join(store: dist.Store, on_gpu: bool) -> None:
    """Make this process one of the group whose members exchange gradients.

    Raises:
        DistributedError: the others have not joined it within JOIN_SECONDS.
    """
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = dist.PrefixStore("group", store)
    backend = "nccl" if on_gpu else "gloo"

    def meet() -> None:  # its timeout is that of all later collectives, too
        dist.init_process_group(backend, store=group, rank=rank, world_size=world_size, timeout=PATIENCE)

    try:
        within(JOIN_SECONDS, f"the others to join the {backend} group", meet)
    except TimeoutError as error:
        raise DistributedError(
            f"process {rank}: the others have not joined the {backend} group within {JOIN_SECONDS:.0f} s; see what "
            f"they said, check that the machines reach each other, and start all of them again"
        ) from error


def agree(store: dist.Store, what: str, values: dict[str, Any]) -> None:
    """Compare a flat dict of plain values with every other process's.

    Args:
        store: what all share.
        what: a name that no other comparison has.
        values: must be the same everywhere.

    Raises:
        DistributedError: on every process alike, with the names and values in which the first one differs; or one has
            not come within JOIN_SECONDS.
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
                f"{', '.join(different)}; start all of them with the same command and the same files"
            )


def _said(store: dist.Store, key: str, rank: int) -> dict[str, Any]:
    try:
        store.wait([key], timedelta(seconds=JOIN_SECONDS))
    except dist.DistStoreError as error:
        raise DistributedError(
            f"process {rank} has not come within {JOIN_SECONDS:.0f} s; see what it said, and start all of them again"
        ) from error
    return json.loads(store.get(key))


def tell(store: dist.Store, values: dict[str, Any] | None) -> dict[str, Any]:
    """What the first process has to say to all: it gives the values, the others None; all get them, however late.

    Raises:
        DistributedError: the store has gone.
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
    """For the length of a `with` block, a store that does not answer any more is our error."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise DistributedError(
            f"process {os.environ['RANK']} has lost the store that all share, at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: whoever holds it has gone; see what it said, and start all of them again"
        ) from error


def code_identity() -> dict[str, str]:
    """What code this process runs: a hash of minigpt's own files, and the versions of what it stands on."""
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
