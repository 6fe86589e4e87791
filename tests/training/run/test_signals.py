"""Signals to a run of one process: the step is finished, saved, and nothing of it differs from a run left alone."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt.checkpoint.manifest import verify
from minigpt.errors import Interrupted
from minigpt.training import launch
from minigpt.training.run.checkpoints import Checkpoints
from minigpt.training.run.loader import MicroBatches
from minigpt.training.run.metrics import read_metrics
from training_runs import StartedFork, assert_equal_to_the_bit, losses, run_and_read, saved_tensors, tiny_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as Unix has them")

# Many micro-batches make a step slow, so that few of them pass while a test waits.
ENDLESS = {
    "trainer__max_steps": 100_000,
    "optimizer__schedule": "constant",
    "model__dropout": 0.1,
    "batch__micro_batch_size": 1,
}


def steps_saved(run: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))


def test_a_run_that_was_signalled_is_the_run_that_was_not(tmp_path: Path) -> None:
    """SIGUSR1 saves and goes on; Ctrl-C, then SIGTERM, finish the step, save, and exit with their codes."""
    config = tiny_run(tmp_path, **ENDLESS)
    with StartedFork(config) as started:
        started.wait_for_step(3)
        started.process.send_signal(signal.SIGUSR1)
        started.wait_for(lambda: steps_saved(started.run))
        [saved] = steps_saved(started.run)
        started.wait_for_step(saved + 3)
        started.process.send_signal(signal.SIGINT)
        code, errors = started.end()
    assert code == 130
    assert f"step {saved}: saving, as requested" in errors
    stopped = started.last_step()
    assert steps_saved(started.run) == [saved, stopped]
    assert f"stopping after step {stopped}" in errors and "--resume auto" in errors
    assert "Traceback" not in errors

    with StartedFork(config) as started:
        started.wait_for_step(stopped + 3)
        started.process.send_signal(signal.SIGTERM)
        code, errors = started.end()
    assert code == 143
    stopped = started.last_step()
    assert f"stopping after step {stopped}" in errors and "Traceback" not in errors

    total = stopped + 2
    run, rows = run_and_read(replace(config, trainer=replace(config.trainer, max_steps=total)))
    whole, whole_rows = run_and_read(tiny_run(tmp_path, "whole", **{**ENDLESS, "trainer__max_steps": total}))
    assert losses(rows) == losses(whole_rows)
    assert_equal_to_the_bit(saved_tensors(run, total), saved_tensors(whole, total))


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in a save; what was saved before stays whole. (A shell shows the death by SIGINT as 130.)"""

    def interrupted_save(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    real = Checkpoints.on_step_end

    def on_step_end(self: Checkpoints, trainer, module, step: int) -> None:
        if step == 5:  # stopping, after the first Ctrl-C
            monkeypatch.setattr("minigpt.training.run.checkpoints.save_checkpoint", interrupted_save)
        real(self, trainer, module, step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "on_step_end", on_step_end)
    config = tiny_run(tmp_path, checkpoint__every=2)
    child = os.fork()
    if child == 0:
        try:
            launch.train(config)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT
    assert steps_saved(tmp_path / "runs/run") == [2, 4]
    for step in (2, 4):
        verify(tmp_path / f"runs/run/checkpoints/step-{step:08d}")


def test_signals_in_a_save_wait_until_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call to the operating system's fsync a signal arrives; the run stops at the next step, all is whole."""
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        real(descriptor)

    def at_step_four(self: Checkpoints, trainer, module, step: int) -> None:
        with monkeypatch.context() as patched:
            if step == 4:
                patched.setattr(os, "fsync", fsync)
            on_step_end(self, trainer, module, step)

    on_step_end = Checkpoints.on_step_end
    monkeypatch.setattr(Checkpoints, "on_step_end", at_step_four)
    with pytest.raises(Interrupted) as raised:
        launch.train(tiny_run(tmp_path, checkpoint__every=4))
    assert raised.value.exit_code == 143
    assert len(calls) > 3
    assert steps_saved(tmp_path / "runs/run") == [4, 5]
    for step in (4, 5):
        verify(tmp_path / f"runs/run/checkpoints/step-{step:08d}")


def test_a_signal_before_the_first_step_stops_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoints.on_fit_start

    def on_fit_start(self: Checkpoints, *arguments) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(self, *arguments)

    monkeypatch.setattr(Checkpoints, "on_fit_start", on_fit_start)
    with pytest.raises(Interrupted) as raised:
        launch.train(tiny_run(tmp_path))
    assert raised.value.exit_code == 130
    assert steps_saved(tmp_path / "runs/run") == [1]


@pytest.mark.parametrize("hook", ["__len__", "__iter__"])  # before Lightning's loop begins, and as it does
def test_a_sigterm_while_lightning_starts_is_one_like_any_other(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own handler would end the run with exit code 0, as if it were finished."""
    real, sent = getattr(MicroBatches, hook), []

    def signalled(self: MicroBatches):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(self)

    monkeypatch.setattr(MicroBatches, hook, signalled)
    with pytest.raises(Interrupted) as raised:
        launch.train(tiny_run(tmp_path))
    assert raised.value.exit_code == 143
    assert steps_saved(tmp_path / "runs/run") == [1]


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    launch.train(tiny_run(tmp_path, trainer__max_steps=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_one_sigusr1_saves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoints.on_step_end

    def on_step_end(self: Checkpoints, trainer, module, step: int) -> None:
        real(self, trainer, module, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Checkpoints, "on_step_end", on_step_end)
    launch.train(tiny_run(tmp_path, checkpoint__keep=10))
    assert steps_saved(tmp_path / "runs/run") == [3, 8]
    assert len(losses(read_metrics(tmp_path / "runs/run/metrics.jsonl"))) == 8
