"""Find the process that hangs: each reports progress and watches the others.

In every process a thread writes a heartbeat and the position of the main thread (micro-batch, phase) to the shared
store, several times per `trainer.hang_seconds`. Every process reads those of all others.

Found within hang_seconds:

- A process without a heartbeat: stopped, swapped out, its machine gone, or its interpreter blocked by native code. A
  process that works has a heartbeat at all times: compiling, validating, saving or preparing data is never too slow.
- A store that no longer answers (its process is stopped): every process exits by itself.
- A process with a heartbeat whose main thread stays in the forward pass, backward pass or update of a step while others
  are ahead and wait for it: an endless loop or a deadlock.

Not found: a main thread that hangs between two steps (saving, validating, sampling; a slow disk looks the same), and a
hang of all processes at the same position.

When a process hangs, the verdict is written to the store. Every process that still can writes the stacks of its threads
to runs/NAME/stacks/rank-N.txt. One of them reports which process hangs and where the others were, and all exit with
exit code 8.

If the launcher is killed, the thread asks its own process to stop, as the launcher would: the step is finished and
saved.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor

from minigpt.errors import DistributedError, leave
from minigpt.terminal import notice
from minigpt.training.processes.join import connect

FORWARD, BACKWARD, UPDATE, BETWEEN = range(4)
PHASES = ("forward pass", "backward pass", "update", "between steps")
VERDICT = "verdict"
BEATS = 20  # heartbeats per hang_seconds
# The assumed state of a process that has not published a heartbeat since this process started watching.
NOT_YET: dict[str, Any] = {"beat": 0, "place": [-1, BETWEEN], "where": "starting", "done": False, "pid": 0, "host": "?"}
LIMIT = 0.75  # fraction of hang_seconds; the rest is for the heartbeat interval and for writing stacks
ALONE_SECONDS = 120.0  # time to finish a step and a save without a launcher, which would end a hanging process


@dataclass
class Seen:
    """The state that a process last published, and since when it is unchanged (by this process's clock)."""

    shown: dict[str, Any]
    beat_since: float
    place_since: float

    def update(self, shown: dict[str, Any], now: float) -> None:
        if shown["beat"] != self.shown["beat"]:
            self.beat_since = now
        if shown["place"] != self.shown["place"]:
            self.place_since = now
        self.shown = shown


def hanging(seen: dict[int, Seen], now: float, limit: float) -> dict[int, str]:
    """Find the processes that hang. A pure function.

    Args:
        seen: state by rank; processes that are done are ignored.
        now: current time by the clock of `seen`.
        limit: seconds.

    Returns:
        rank -> description; empty if no process hangs.
    """
    running = {rank: each for rank, each in seen.items() if not each.shown["done"]}
    found = {
        rank: f"has had no heartbeat for {now - each.beat_since:.0f} s"
        for rank, each in running.items()
        if now - each.beat_since > limit
    }
    if found or not running:
        return found
    front = max(each.shown["place"] for each in running.values())
    if any(now - each.place_since <= limit for each in running.values() if each.shown["place"] == front):
        return {}  # the processes ahead have not waited long enough
    for rank, each in running.items():
        micro_batch, phase = each.shown["place"]
        # The first micro-batch is excluded, since it may compile.
        works = phase != BETWEEN and micro_batch > 0
        if each.shown["place"] < front and works and now - each.place_since > limit:
            found[rank] = f"has been in the same {PHASES[phase]} for {now - each.place_since:.0f} s while others wait"
    return found


class Watch(pl.Callback):
    """Tracks the position of this process's main thread; a thread publishes it and watches the other processes.

    Args:
        run: the run's folder, for stacks/.
        rank: rank of this process.
        world_size: number of processes.
        hang_seconds: time within which a hanging process is reported; 0: only watch whether the launcher lives.
        resume: hint on how to resume, for messages.
    """

    def __init__(self, run: Path, rank: int, world_size: int, hang_seconds: float, resume: str) -> None:
        self.folder, self.rank, self.world_size, self.resume = run / "stacks", rank, world_size, resume
        self.hang_seconds = hang_seconds
        self.interval = min(2.0, hang_seconds / BEATS) if hang_seconds else 1.0
        self.place = (
            -1,
            BETWEEN,
        )  # (micro-batch since the start, phase): only increases, and comparable between processes
        self.where = "starting"
        self._rounds = 0  # loop count of the watch thread; each loop queries the store
        self._done = threading.Event()
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._deadline = math.inf  # set when the launcher has ended

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager: run the watch threads."""
        thread = threading.Thread(target=self._run, name="watch", daemon=True)
        thread.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(5 * self.interval)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.where = f"step {trainer.global_step + 1}"
        self.place = (batch_idx, FORWARD)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.place = (self.place[0], BACKWARD)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.place = (self.place[0], UPDATE)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.place = (batch_idx, BETWEEN)

    def _run(self) -> None:
        try:
            self._watch(connect())
        except (RuntimeError, DistributedError) as error:  # the process that holds the store has ended
            self._rounds = 0
            self._done.wait(self.interval)  # a dying process loses its connections before it loses its children
            self._look_for_launcher()
            left = self._deadline - time.monotonic()
            if not self._done.wait(left if math.isfinite(left) else self.hang_seconds or 60.0):
                self._leave(f"has lost the connection to the store ({str(error).splitlines()[0]})")

    def _guard(self) -> None:
        """Save and exit if the store does not answer the watch thread: Ctrl-Z may have stopped the store's process.

        It counts loops instead of time, since this process may have been stopped itself.
        """
        rounds = waited = asked = 0
        while self.hang_seconds and not self._done.wait(self.interval):
            waited = waited + 1 if self._rounds == rounds and rounds else 0
            rounds = self._rounds
            seconds = waited * self.interval
            if seconds > self.hang_seconds and not asked:  # the training step does not need the store
                asked = 1
                os.kill(os.getpid(), signal.SIGTERM)
            if seconds > 2 * self.hang_seconds:
                self._leave(f"the store has not answered for {seconds:.0f} s")

    def _look_for_launcher(self) -> None:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher, self._deadline = None, time.monotonic() + ALONE_SECONDS
            os.kill(os.getpid(), signal.SIGTERM)
            with suppress(OSError):  # stderr may be closed
                notice(f"process {self.rank}: the launcher has ended; stopping. {self.resume}")

    def _leave(self, why: str) -> None:
        with suppress(OSError):
            notice(f"process {self.rank}: {why}; exiting. {self.resume}")
        leave(DistributedError.exit_code)

    def _watch(self, store: dist.Store) -> None:
        seen: dict[int, Seen] = {}
        beat = 0
        looked = time.monotonic()
        while not self._done.wait(self.interval):
            self._look_for_launcher()
            if time.monotonic() > self._deadline:
                self._leave(f"did not finish within {ALONE_SECONDS:.0f} s after its launcher ended")
            self._rounds += 1
            if not self.hang_seconds:
                continue
            beat += 1
            self._show(store, beat, done=False)
            now = time.monotonic()
            self._look(store, seen, now)
            if now - looked > LIMIT * self.hang_seconds / 2:  # this process was stopped itself, perhaps all were
                seen.clear()
            looked = now
            if not store.check([VERDICT]) and (found := hanging(seen, now, LIMIT * self.hang_seconds)):
                self._accuse(store, seen, found)
            if store.check([VERDICT]):
                self._end(store)
        if self.hang_seconds:
            self._show(store, beat + 1, done=True)

    def _show(self, store: dist.Store, beat: int, done: bool) -> None:
        shown = {"beat": beat, "place": self.place, "where": self.where, "done": done}
        store.set(f"beat/{self.rank}", json.dumps({**shown, "pid": os.getpid(), "host": platform.node()}))

    def _look(self, store: dist.Store, seen: dict[int, Seen], now: float) -> None:
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            shown = json.loads(store.get(key)) if store.check([key]) else NOT_YET
            if rank in seen:
                seen[rank].update(shown, now)
            else:
                seen[rank] = Seen(shown, now, now)

    def _accuse(self, store: dist.Store, seen: dict[int, Seen], found: dict[int, str]) -> None:
        """Write the verdict to the store; only the first one counts."""
        accused = "; ".join(f"process {rank} on {seen[rank].shown['host']} {how}" for rank, how in found.items())
        places = "; ".join(
            f"process {rank}: {each.shown['where']}, {PHASES[each.shown['place'][1]]}, pid {each.shown['pid']}"
            for rank, each in sorted(seen.items())
        )
        verdict = {"by": self.rank, "hanging": sorted(found), "text": f"{accused} ({places})"}
        store.compare_set(VERDICT, "", json.dumps(verdict))

    def _end(self, store: dist.Store) -> None:
        """Write this process's stacks and exit; the process that wrote the verdict waits for the others and reports."""
        verdict = json.loads(store.get(VERDICT))
        with suppress(OSError):  # exit even if the disk is full
            self.folder.mkdir(exist_ok=True)
            with open(self.folder / f"rank-{self.rank}.txt", "w", encoding="utf-8") as file:
                file.write(f"process {self.rank}, pid {os.getpid()} on {platform.node()}: {self.where}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        store.set(f"stacks/{self.rank}", "")
        others = [f"stacks/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + 3 * self.interval
        while not store.check(others) and time.monotonic() < deadline:
            time.sleep(self.interval / 4)
        if verdict["by"] == self.rank:
            silent = [str(rank) for rank, key in enumerate(others) if not store.check([key])]
            missing = f" (except of process {', '.join(silent)}, which does not answer)" if silent else ""
            notice(f"{verdict['text']}; stacks are in {self.folder}{missing}; {self.resume}")
        leave(DistributedError.exit_code)
