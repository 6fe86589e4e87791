"""From minutes to steps: against a run played step by step, and with runs whose measurements are given."""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from minigpt.errors import ConfigError, NotLearning
from minigpt.training import budget
from minigpt.training.budget import Timing, measure, seconds_of, steps_within, times_due
from minigpt.training.launch import train
from minigpt.training.plan import choose
from minigpt.training.run.each_step import due
from minigpt.training.run.fit import fit
from minigpt.training.run.job import Job
from minigpt.training.run.settle import settle
from training_runs import losses, run_and_read, tiny_run

TIMING = Timing(step=0.2, start=3.0, cold_start=20.0, validation=1.1, save=0.3, sample=2.0)


def test_a_budget_by_hand(tmp_path: Path) -> None:
    """100 s: 3 to start; a sample of 2 s at the end; every 100 steps a validation and the save it may bring (1.4 s).

    So 100 steps take 20 + 1.4 s. Four such hundreds leave 100 - 3 - 2 - 4 x 21.4 = 9.4 s; 1.4 of them go to the last
    step's validation and save, 8.0 to forty steps.
    """
    config = tiny_run(tmp_path, eval__every=100, checkpoint__every=200, sample__max_new_tokens=5)
    assert seconds_of(config, TIMING, 440) == pytest.approx(100.0)
    assert steps_within(config, TIMING, 100.001) == 440
    assert steps_within(config, TIMING, 99.999) == 439
    assert steps_within(config, TIMING, 6.6) == 0
    assert steps_within(config, TIMING, 6.61) == 1


@pytest.mark.parametrize(("validate", "save", "sample"), list(product((0, 1, 6), (1, 4, 50), (0, 7))))
def test_a_budget_is_what_a_run_played_step_by_step_takes(
    validate: int, save: int, sample: int, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path, eval__every=validate, checkpoint__every=save, sample__every=sample)

    def played(steps: int) -> float:
        seconds = TIMING.start
        for step in range(1, steps + 1):
            seconds += TIMING.step
            validates = due(step, validate, steps)
            seconds += TIMING.validation * validates + TIMING.sample * due(step, sample, steps)
            seconds += TIMING.save * (validates or due(step, save, steps))
        return seconds

    for steps in (1, 2, 5, 12, 29, 100):
        assert seconds_of(config, TIMING, steps) == pytest.approx(played(steps))
    found = steps_within(config, TIMING, 60.05)
    assert played(found) <= 60.05 < played(found + 1)
    assert times_due(24, 4, 6) == sum(step % 4 == 0 or step % 6 == 0 for step in range(1, 25)) == 8


def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a second passes whenever the time is asked for, however fast the machine is."""
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=itertools.count(0, 0.1).__next__))


def test_a_resumed_run_keeps_the_steps_that_its_minutes_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    timing = Timing(step=1.0, start=10.0, cold_start=10.0, validation=2.0, save=1.0, sample=0.0)
    monkeypatch.setattr(budget, "measure", lambda *arguments, **options: timing)
    slow_clock(monkeypatch)
    config = tiny_run(tmp_path, minutes=0.5)  # 30 s: 10 to start, 3 at the end, 17 for steps, less the probe's moment
    run, rows = run_and_read(config)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    steps = stored["trainer"]["max_steps"]
    assert steps == 16
    assert stored["minutes"] == 0.5
    assert rows[-1]["step"] == steps
    said = capsys.readouterr().err
    assert "0.5 minutes: 16 steps of 1 s (probe 0 s, start 10.0 s, 1 validation of 2 s, 1 save of 1 s)" in said
    assert "planned for 0.5 minutes, including probe and start: 16 steps took" in said

    monkeypatch.setattr(budget, "measure", lambda *arguments, **options: pytest.fail("measured again"))
    shutil.rmtree(run / "checkpoints/step-00000016")
    for given in (config, replace(config, minutes=7.0)):
        train(given)
        assert yaml.safe_load((run / "config.yaml").read_text()) == stored
        assert "its 16 steps were fixed when it began and stay" in capsys.readouterr().err
    train(replace(config, minutes=None, trainer=replace(config.trainer, max_steps=18)))
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 18


def test_compilation_pays_where_a_run_is_long_and_gains() -> None:
    """Compiling costs 10 s and halves a step of 0.2 s: 51 s are 256 steps, of which it saves 25 s."""
    plain = Timing(step=0.2, start=1.0, cold_start=2.0, validation=0.0, save=0.0, sample=0.0)
    compiled = Timing(step=0.1, start=1.5, cold_start=12.0, validation=0.0, save=0.0, sample=0.0)
    assert budget.compilation_pays(plain, compiled, 256)
    assert not budget.compilation_pays(plain, compiled, 250)
    assert not budget.compilation_pays(plain, replace(compiled, step=0.19), 900)  # 180 s, but saves only 9 s
    assert not budget.compilation_pays(plain, replace(compiled, step=0.3), 10**6)


def test_minutes_too_few_for_a_step_say_how_many_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(step=1.0, start=10.0, cold_start=10.0, validation=2.0, save=1.0, sample=0.0)
    monkeypatch.setattr(budget, "measure", lambda *arguments, **options: timing)
    slow_clock(monkeypatch)
    with pytest.raises(ConfigError, match=r"minutes: 0.1 is too short for one step: .* give at least 0.3"):
        train(tiny_run(tmp_path, minutes=0.1))
    run, _ = run_and_read(tiny_run(tmp_path, minutes=0.3))  # the run was not begun: it can be given more
    assert yaml.safe_load((run / "config.yaml").read_text())["minutes"] == 0.3


def test_a_probe_measures_every_part_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    changes = {"sample__max_new_tokens": 3, "model__dropout": 0.1, "trainer__max_steps": 4}
    _, plain = run_and_read(tiny_run(tmp_path, "plain", **changes))
    config = tiny_run(tmp_path, "probed", trainer__precision="32-true", **changes)
    with ExitStack() as held:
        job = settle(config, held)
        capsys.readouterr()
        timing = measure(job, fit, allowance=0.1)
        assert capsys.readouterr().err == ""
        assert not (job.run / ".probe").exists()
        fit(job)
    assert min(timing.step, timing.start, timing.validation, timing.save, timing.sample) > 0
    _, rows = run_and_read(config)
    assert losses(rows) == losses(plain)


def test_a_probe_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(job: object) -> None:
        raise RuntimeError("a bug")

    with ExitStack() as held:
        job = settle(tiny_run(tmp_path), held)
        with pytest.raises(RuntimeError, match="a bug"):
            measure(job, broken)
        assert not (job.run / ".probe").exists()


def test_what_was_decided_when_a_run_began_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "pick_precision", lambda config: ("32-true", "said so"))
    run, _ = run_and_read(tiny_run(tmp_path, trainer__precision="auto", trainer__compile=None, trainer__max_steps=4))
    trainer = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    assert (trainer["precision"], trainer["compile"]) == ("32-true", False)

    def never(*arguments: object) -> None:
        raise AssertionError("decided again")

    monkeypatch.setattr(choose, "pick_precision", never)
    monkeypatch.setattr(budget, "decide_compilation", never)
    _, rows = run_and_read(tiny_run(tmp_path, trainer__precision="auto", trainer__compile=None, trainer__max_steps=6))
    assert rows[-1]["step"] == 6


def test_a_long_run_is_compiled_where_a_probe_says_that_it_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    slow = Timing(step=0.2, start=1.0, cold_start=2.0, validation=0.0, save=0.0, sample=0.0)
    seconds = {False: slow, True: replace(slow, step=0.1, cold_start=42.0)}
    monkeypatch.setattr(budget, "measure", lambda job, probe, compile, allowance: seconds[compile])
    job = settle(tiny_run(tmp_path, trainer__compile=None), ExitStack())
    for share, steps, expected in ((1e9, 10**9, False), (1e-9, 10**9, True), (1e-9, 1500, True), (1e-9, 900, False)):
        monkeypatch.setattr(budget, "peak_flops", lambda device, precision, share=share: 1e9 * share)
        long = replace(job, config=replace(job.config, trainer=replace(job.config.trainer, max_steps=steps)))
        assert budget.decide_compilation(long, lambda job: None).trainer.compile is expected
    assert "compiled: a step takes 0.1 s compiled, 0.2 s eager; compilation takes 40 s" in capsys.readouterr().err


def test_on_a_gpu_the_cost_of_compiling_decides_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """0.05 s a step, 0.03 compiled, 16 s to compile: it pays from 1,600 steps on, which are 80 s."""
    job = settle(tiny_run(tmp_path, trainer__compile=None, trainer__accelerator="cpu"), ExitStack())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plain = Timing(step=0.05, start=1.0, cold_start=2.0, validation=0.0, save=0.0, sample=0.0)
    timings = {False: plain, True: replace(plain, step=0.03, cold_start=18.0)}
    asked: list[bool] = []

    def measured(job: Job, probe: object, compile: bool, allowance: float) -> Timing:
        asked.append(compile)
        return timings[compile]

    monkeypatch.setattr(budget, "measure", measured)
    for steps, minutes, expected, measurements in (
        (400, None, False, [False]),
        (1_199, None, False, [False]),
        (1_590, None, False, [False, True]),
        (1_610, None, True, [False, True]),
        (400, 0.9, False, []),
        (400, 10.0, True, [False, True]),
    ):
        asked.clear()
        trainer = replace(job.config.trainer, max_steps=steps, accelerator="gpu")
        given = replace(job, config=replace(job.config, trainer=trainer, minutes=minutes))
        assert budget.decide_compilation(given, lambda job: None).trainer.compile is expected, steps
        assert asked == measurements
    assert "not compiled: a run of at most 20 s is too short to benefit" in capsys.readouterr().err


def test_what_does_not_train_compiled_is_trained_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = settle(tiny_run(tmp_path, trainer__compile=None, trainer__max_steps=10**9), ExitStack())

    def measured(job: Job, probe: object, compile: bool, allowance: float) -> Timing:
        if compile:
            raise NotLearning("the compiled step is wrong")
        return TIMING

    monkeypatch.setattr(budget, "measure", measured)
    monkeypatch.setattr(budget, "peak_flops", lambda device, precision: 1.0)
    assert budget.decide_compilation(job, lambda job: None).trainer.compile is False
    assert "not compiled: the compiled step does not train (the compiled step" in capsys.readouterr().err
