"""Several processes give what one gives, and whatever happens to them nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forks import Fork, in_forks
from minigpt.checkpoint.manifest import verify
from minigpt.errors import DistributedError, MinigptError
from minigpt.training import launch
from minigpt.training.config import TrainConfig
from minigpt.training.processes import join
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.module import TrainingModule
from training_runs import (
    Started,
    StartedFork,
    assert_equal_to_the_bit,
    corpus_file,
    forked,
    losses,
    run_and_read,
    saved_tensors,
    tiny_run,
)

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up as on Linux"),
]

TWO = {"trainer__devices": 2, "optimizer__schedule": "constant", "batch__micro_batch_size": 1, "model__dropout": 0.1}
ENDLESS = {**TWO, "trainer__max_steps": 100_000, "checkpoint__every": 5, "checkpoint__keep": 100_000}


def rows_of(config: TrainConfig) -> list[dict]:
    return read_metrics(Path(config.runs_dir) / str(config.run_name) / "metrics.jsonl")


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Over 50 steps, with accumulation, clipping and validation; also when the end is lost and done again."""
    changes = {
        "trainer__max_steps": 50,
        "eval__every": 20,
        "model__preset": "llama",
        "checkpoint__every": 40,
        "batch__micro_batch_size": 2,
    }
    one, one_rows = run_and_read(tiny_run(tmp_path, "one", **changes))
    config = tiny_run(tmp_path, "two", trainer__devices=2, **changes)
    assert forked(config) == {0: 0, 1: 0}
    two_rows = rows_of(config)
    assert len(losses(two_rows)) == 50
    assert losses(two_rows) == pytest.approx(losses(one_rows), abs=1e-5)
    norms = [[row["grad_norm"] for row in rows if "grad_norm" in row] for rows in (one_rows, two_rows)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    values = [[row["val/loss"] for row in rows if "val/loss" in row] for rows in (one_rows, two_rows)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    counts = [[row["val/tokens"] for row in rows if "val/tokens" in row] for rows in (one_rows, two_rows)]
    assert counts[0] == counts[1]
    two = tmp_path / "runs/two"
    a, b = saved_tensors(one, 50), saved_tensors(two, 50)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)

    shutil.rmtree(two / "checkpoints/step-00000050")  # two processes go on from step 40, to the bit
    assert forked(config) == {0: 0, 1: 0}
    assert losses(rows_of(config)) == losses(two_rows)
    assert_equal_to_the_bit(saved_tensors(two, 50), b)


def signal_itself(rank: int, number: int, at_step: int):
    """For `forked`: process `rank` sends itself a signal in the forward pass of a step."""

    def before(mine: int) -> None:
        real = TrainingModule.training_step

        def training_step(self: TrainingModule, batch, batch_index: int):
            if mine == rank and self.trainer.global_step + 1 == at_step and batch_index % 4 == 1:
                os.kill(os.getpid(), number)
            return real(self, batch, batch_index)

        TrainingModule.training_step = training_step  # type: ignore[method-assign]

    return before


def test_two_processes_lose_nothing_whatever_happens_to_them(tmp_path: Path) -> None:
    """One run that is asked to save, stopped, killed here and there, and hung, ends as the one that was left alone."""
    config = tiny_run(tmp_path, **ENDLESS)
    with StartedFork(config) as started:  # SIGUSR1 to the launcher: both save and go on; Ctrl-C: both stop
        started.wait_for_step(6)
        started.wait_for(asked_to_save(started, started.process.pid))
        started.process.send_signal(signal.SIGINT)
        code, errors = started.end()
    assert code == 130
    assert "saving, as requested" in errors and errors.count("stopping after step") == 1
    assert "stopped by SIGINT; resume with --run_name run --resume auto" in errors and "Traceback" not in errors
    assert steps_saved(started.run)[-1] == started.last_step()

    with StartedFork(config) as started:  # one is killed
        started.wait_for_step(started.last_step() + 7)
        os.kill(started.workers()[1], signal.SIGKILL)
        code, errors = started.end()
    assert code == 8
    assert "process 1 ended (killed by SIGKILL" in errors and "resume with --run_name run" in errors
    assert "Traceback" not in errors

    watched = replace(config, trainer=replace(config.trainer, hang_seconds=4.0))
    with StartedFork(watched) as started:  # one is stopped: the launcher ends it
        started.wait_for_step(started.last_step() + 7)
        os.kill(started.workers()[0], signal.SIGSTOP)
        code, errors = started.end()
        assert not started.workers()
    assert code == 8
    assert "process 0 on " in errors and "has had no heartbeat" in errors
    assert "process 0 hung and was stopped; resume with --run_name run" in errors

    step = steps_saved(started.run)[-1]  # the first is killed, in a step
    assert forked(config, signal_itself(0, signal.SIGKILL, step + 7)) == {0: -9, 1: 8}
    step = steps_saved(started.run)[-1]  # only one hears of a SIGTERM: both stop at the same step
    assert forked(config, signal_itself(1, signal.SIGTERM, step + 3)) == {0: 143, 1: 143}
    assert steps_saved(started.run)[-1] == step + 3 == started.last_step()

    total = step + 5
    assert set(forked(replace(config, trainer=replace(config.trainer, max_steps=total))).values()) == {0}
    whole = tiny_run(tmp_path, "whole", **{**ENDLESS, "trainer__max_steps": total})
    assert set(forked(whole).values()) == {0}
    assert losses(rows_of(config)) == losses(rows_of(whole))
    assert_equal_to_the_bit(saved_tensors(started.run, total), saved_tensors(tmp_path / "runs/whole", total))


def asked_to_save(started: Started, pid: int) -> Callable[[], bool]:
    """Ask this process to save until it did so at a step that is not due anyway, at every fifth."""

    def saved() -> bool:
        os.kill(pid, signal.SIGUSR1)
        return any(step % 5 for step in steps_saved(started.run))

    return saved


def steps_saved(run: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))


def test_processes_save_and_leave_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with StartedFork(tiny_run(tmp_path, **ENDLESS)) as started:
        started.wait_for_step(3)
        workers = started.workers()
        os.kill(started.process.pid, signal.SIGKILL)
        started.process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
            time.sleep(0.05)
    assert steps_saved(started.run)[-1] == started.last_step()
    verify(started.run / f"checkpoints/step-{started.last_step():08d}")


def test_torchrun_starts_the_same_run_and_its_processes_hear_signals(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "started", **ENDLESS)
    with Started(config, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2") as started:
        started.wait_for_step(3)
        started.wait_for(asked_to_save(started, started.workers()[1]))  # one is enough
        started.process.terminate()
        _, errors = started.end()
    last = started.last_step()
    assert "saving, as requested" in errors and f"stopping after step {last}" in errors
    assert steps_saved(started.run)[-1] == last
    whole = tiny_run(tmp_path, "whole", **{**ENDLESS, "trainer__max_steps": last})
    assert set(forked(whole).values()) == {0}
    assert losses(rows_of(config)) == losses(rows_of(whole))


def test_a_process_that_fails_gives_its_exit_code(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, trainer__devices=2, optimizer__learning_rate=1e30, trainer__gradient_clip_val=0.0)
    with pytest.raises(MinigptError, match=r"process \d ended \(exit code 7\); resume with --run_name run") as raised:
        launch.train(config)
    assert raised.value.exit_code == 7
    for folder in (tmp_path / "runs/run/checkpoints").iterdir():
        verify(folder)


def train_and_say(config: TrainConfig) -> int:
    """What the command line does."""
    try:
        launch.train(config)
    except MinigptError as error:
        os.write(2, f"{error}\n".encode())
        return error.exit_code
    return 0


def test_processes_started_with_other_flags_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = tiny_run(tmp_path, trainer__devices=2)
    other = replace(config, seed=4, eval=replace(config.eval, tokens=5))
    assert in_forks(2, lambda rank: train_and_say([config, other][rank])) == {0: 8, 1: 8}
    said = capfd.readouterr().err
    assert said.count("process 1 on ") == 2
    assert "was started with another config than process 0" in said
    assert "eval.tokens 5 (process 0: 1000000), seed 4 (process 0: 3); start all processes with the same" in said
    assert not (tmp_path / "runs").exists()


def test_processes_with_another_corpus_or_other_code_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_code(rank: int) -> None:
        if rank == 1:
            monkeypatch.setattr(
                "minigpt.training.run.fit.code_identity", lambda: {**join.code_identity(), "torch": "1.0"}
            )

    assert forked(tiny_run(tmp_path, trainer__devices=2), other_code) == {0: 8, 1: 8}
    assert f"torch '1.0' (process 0: '{torch.__version__}')" in capfd.readouterr().err

    prepared = launch.settle
    other = tiny_run(tmp_path, "other")
    text = corpus_file(tmp_path).with_name("other.txt")
    text.write_text("another text " * 500)
    other = replace(other, data=replace(other.data, source=str(text)))
    from contextlib import ExitStack

    with ExitStack() as held:
        elsewhere = prepared(other, held).corpus

    def other_corpus(rank: int) -> None:
        from minigpt.data.shards import open_corpus

        if rank == 1:
            monkeypatch.setattr("minigpt.training.run.fit.open_corpus", lambda folder: open_corpus(elsewhere))

    assert forked(tiny_run(tmp_path, trainer__devices=2), other_corpus) == {0: 8, 1: 8}
    assert "process 1 on " in (said := capfd.readouterr().err) and "corpus '" in said


def place(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_that_never_comes_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "JOIN_SECONDS", 1.0)
    config = tiny_run(tmp_path, trainer__devices=2)
    assert in_forks(2, lambda rank: train_and_say(config) if rank == 0 else 0) == {0: 8, 1: 0}
    assert "process 1 has not connected within 1 s; see its messages" in capfd.readouterr().err


def test_losing_the_first_process_before_training_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no launcher holds the store, as under SLURM, it goes with the first process."""
    config = tiny_run(tmp_path, trainer__devices=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(launch, "settle", lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def target(rank: int) -> int:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        place(monkeypatch, rank, port)
        return train_and_say(config)

    assert in_forks(2, target) == {0: -9, 1: 8}
    assert f"process 1 has lost the connection to the store at 127.0.0.1:{port}: its process" in capfd.readouterr().err


def test_a_port_that_is_taken_or_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fork, as a connection that is given up leaves its thread behind."""
    monkeypatch.setattr(join, "JOIN_SECONDS", 1.0)

    def refused(rank: int, port: int, why: str) -> None:
        place(monkeypatch, rank, port)
        with pytest.raises(
            DistributedError,
            match=rf"process {rank} cannot meet the others at 127\.0\.0\.1:{port} \({why}",
        ):
            join.connect()

    def tries() -> int:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            refused(0, port, "the port is in use")
            refused(1, port, "no store answers")  # somebody listens, but holds no store
        refused(1, port, r"no store answers there\); check MASTER_ADDR")
        return 0

    assert Fork(tries).wait() == 0


def test_a_process_that_does_not_join_the_group_is_not_waited_for_without_end(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "JOIN_SECONDS", 1.0)

    def alone(rank: int) -> int:
        os.environ["WORLD_SIZE"] = "2"
        store = join.connect()
        try:
            join.join(store, on_gpu=False)
        except DistributedError as error:
            os.write(2, str(error).encode())
            return error.exit_code
        return 0

    assert in_forks(1, alone) == {0: 8}
    assert "process 0: the other processes have not joined the gloo group within 1 s; see" in capfd.readouterr().err


def test_a_long_preparation_is_waited_for_and_said(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "UNEASY_SECONDS", 0.05)
    notice = join.notice

    def hear(rank: int) -> int:
        store, beside = join.connect(), join.connect()

        def say(text: str) -> None:
            notice(text)
            beside.set("said", "")

        monkeypatch.setattr(join, "notice", say)
        if rank == 0:
            beside.get("said")  # prepares for as long as it takes the other to say so
        assert join.tell(store, None if rank else {"it": 1}) == {"it": 1}
        return 0

    assert in_forks(2, hear) == {0: 0, 1: 0}
    assert capfd.readouterr().err.count("process 1: waiting for process 0, which prepares the run") == 1
