"""Who hangs, by hand; and processes that do."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from forks import in_forks
from minigpt.checkpoint.manifest import verify
from minigpt.training.launch import train
from minigpt.training.processes.watch import BACKWARD, BETWEEN, FORWARD, UPDATE, Seen, hanging
from minigpt.training.run.checkpoints import Checkpoints
from minigpt.training.run.module import TrainingModule
from training_runs import forked, tiny_run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def process(place: tuple[int, int], place_for: float, beat_for: float = 0.0, done: bool = False) -> Seen:
    """Seen at time 100: how long it has been at its place, and how long its beat has stood still."""
    return Seen({"beat": 1, "place": place, "done": done}, 100 - beat_for, 100 - place_for)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # All work.
        ([process((5, FORWARD), 1), process((5, BACKWARD), 1)], []),
        # Two is behind in the same pass for long, one waits for it as long.
        ([process((5, BACKWARD), 70), process((5, FORWARD), 71)], [1]),
        ([process((5, UPDATE), 70), process((5, UPDATE), 71), process((5, BACKWARD), 71)], [2]),
        ([process((6, BACKWARD), 70), process((5, UPDATE), 70)], [1]),
        # Those ahead have only just come: the slow one may be slow.
        ([process((5, BACKWARD), 2), process((5, FORWARD), 71)], []),
        # The one behind has just moved.
        ([process((5, BACKWARD), 70), process((5, FORWARD), 2)], []),
        # A save (or validation, or sample) of ten minutes, while another waits at the barrier, or in the next step.
        ([process((5, BETWEEN), 600), process((5, BETWEEN), 600)], []),
        ([process((5, BETWEEN), 600), process((6, BACKWARD), 599)], []),
        # Compiling, in the first micro-batch; starting.
        ([process((0, FORWARD), 300), process((0, BACKWARD), 299)], []),
        ([process((-1, BETWEEN), 300), process((0, BACKWARD), 299)], []),
        # All at the same place: nobody waits for anybody that is behind.
        ([process((5, BACKWARD), 600), process((5, BACKWARD), 600)], []),
        # No sign of life: whatever it did, and although others are behind.
        ([process((5, BETWEEN), 600, beat_for=61), process((5, BETWEEN), 600)], [0]),
        ([process((5, BETWEEN), 600, beat_for=59), process((5, BETWEEN), 600)], []),
        ([process((5, BACKWARD), 70, beat_for=61), process((5, FORWARD), 70)], [0]),
        # Who is done is out of account, also as one that is ahead.
        ([process((9, BETWEEN), 600, beat_for=600, done=True), process((5, BETWEEN), 1)], []),
        ([process((9, BETWEEN), 600, done=True), process((5, FORWARD), 70)], []),
        ([process((9, BETWEEN), 600, done=True)], []),
    ],
)
def test_who_hangs(seen: list[Seen], expected: list[int]) -> None:
    assert list(hanging(dict(enumerate(seen)), 100.0, 60.0)) == expected


def busy(folder: Path, **changes: object):
    changes = {"trainer__max_steps": 100_000, "optimizer__schedule": "constant", "checkpoint__every": 2, **changes}
    return tiny_run(folder, trainer__devices=2, trainer__hang_seconds=4.0, **changes)


def assert_whole(run: Path) -> None:
    assert [verify(folder) for folder in (run / "checkpoints").iterdir()]


def test_a_loop_without_end_in_one_process_is_named_with_the_stacks_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def break_second(rank: int) -> None:
        real = TrainingModule.training_step

        def a_loop_without_end(self: TrainingModule, *arguments):
            while rank == 1 and self.trainer.global_step == 3:
                time.sleep(0.01)
            return real(self, *arguments)

        monkeypatch.setattr(TrainingModule, "training_step", a_loop_without_end)

    assert forked(busy(tmp_path), break_second) == {0: 8, 1: 8}
    said = capfd.readouterr().err
    assert "process 1 on " in said and "has been in the same forward pass for" in said
    assert "process 0: step 4, backward pass" in said and "--resume auto" in said
    stacks = tmp_path / "runs/run/stacks"
    assert "a_loop_without_end" in (stacks / "rank-1.txt").read_text()
    assert "backward" in (stacks / "rank-0.txt").read_text()
    assert_whole(tmp_path / "runs/run")


def test_where_stacks_cannot_be_written_they_leave_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/stacks").write_text("a file")

    def hang(rank: int) -> None:
        real = TrainingModule.training_step

        def training_step(self: TrainingModule, *arguments):
            while rank == 1 and self.trainer.global_step == 1:
                time.sleep(0.01)
            return real(self, *arguments)

        monkeypatch.setattr(TrainingModule, "training_step", training_step)

    assert forked(busy(tmp_path), hang) == {0: 8, 1: 8}
    assert "has been in the same forward pass for" in capfd.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_is_named(
    stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def stop_itself(rank: int) -> None:
        real = TrainingModule.training_step

        def training_step(self: TrainingModule, *arguments):
            if rank == stopped and self.trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(self, *arguments)

        monkeypatch.setattr(TrainingModule, "training_step", training_step)

    codes = forked(busy(tmp_path), stop_itself)
    assert codes == {1 - stopped: 8, stopped: -9}  # the harness kills what does not leave, as the launcher does
    said = capfd.readouterr().err
    assert f"process {stopped} on " in said and "has had no heartbeat for" in said
    assert f"except of process {stopped}, which does not answer" in said
    assert (tmp_path / f"runs/run/stacks/rank-{1 - stopped}.txt").is_file()
    assert_whole(tmp_path / "runs/run")


def test_a_save_longer_than_hang_seconds_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_save(rank: int) -> None:
        real = Checkpoints._save

        def save(self: Checkpoints, *arguments, **options) -> None:
            time.sleep(5)
            real(self, *arguments, **options)

        monkeypatch.setattr(Checkpoints, "_save", save)

    config = tiny_run(tmp_path, trainer__devices=2, trainer__hang_seconds=4.0, trainer__max_steps=2)
    assert forked(config, slow_save) == {0: 0, 1: 0}
    assert_whole(tmp_path / "runs/run")


@pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")
def test_a_store_that_stops_answering_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Where no launcher holds it, it stops with the first process, and nobody can say to the others who hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tiny_run(tmp_path, trainer__devices=2, trainer__hang_seconds=2.0)
    real = TrainingModule.training_step

    def training_step(self: TrainingModule, *arguments):
        if os.environ["RANK"] == "0" and self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, *arguments)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)

    def target(rank: int) -> int:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        os.environ["MASTER_PORT"] = str(port)
        train(config)
        return 0

    assert in_forks(2, target) == {0: -9, 1: 8}
    assert "process 1: the store has not answered for 4 s; exiting" in capfd.readouterr().err
