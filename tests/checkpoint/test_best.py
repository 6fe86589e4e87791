"""The best checkpoint and the last: which is kept, which is loaded, and when patience runs out."""

from __future__ import annotations

import json
import math
import random
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fault_disks as disks
import fault_trials as trials
import minigpt
from minigpt.checkpoint import manifest, runs
from minigpt.checkpoint.pruning import prune
from minigpt.checkpoint.runs import Best, checkpoints_of, find_checkpoint, read_best, record_best
from minigpt.evaluation.loss import Evaluation
from minigpt.training.launch import train
from minigpt.training.run import observing
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.standing import Standing, standing_at
from training_runs import forked, losses, run_and_read, tiny_run


@contextmanager
def validating_to(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]):
    """Within, the validation of a step gives the loss of the table."""
    at = []
    real = observing.Validation._validate

    def validate(self: Any, trainer: Any, module: Any, step: int) -> None:
        at.append(step)
        real(self, trainer, module, step)

    with monkeypatch.context() as patched:
        patched.setattr(observing.Validation, "_validate", validate)
        patched.setattr(observing, "evaluate", lambda *a, **k: Evaluation(values[at[-1]], tokens=1, bytes=1))
        yield at


LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4, 10: 2.2, 12: 2.3}
WATCHED = {"trainer__max_steps": 12, "eval__every": 2, "checkpoint__every": 5, "optimizer__schedule": "constant"}


def steps_of(run: Path) -> list[int]:
    return sorted(runs.step_of(path) for path in checkpoints_of(run))


def test_the_best_checkpoint_stays_and_is_the_one_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with validating_to(monkeypatch, LOSSES):
        run = train(tiny_run(tmp_path, **WATCHED))
    assert steps_of(run) == [4, 10, 12]  # the best, and the newest two; 5 and 2 went
    assert read_best(run) == Best(4, 2.0)
    assert json.loads((run / "best.json").read_text())["step"] == 4
    capsys.readouterr()
    assert minigpt.load(run).path.name == "step-00000004"
    assert "step 4 validated best (2.0000); name" in capsys.readouterr().err
    assert find_checkpoint(run / "checkpoints/step-00000012").name == "step-00000012"

    (run / "checkpoints/step-00000004/config.json").write_text("{}")  # damaged: the newest it is
    assert minigpt.load(run).path.name == "step-00000012"
    assert "skipping a damaged checkpoint" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints/step-00000004")
    assert minigpt.load(run).path.name == "step-00000012"
    (run / "best.json").write_text((run / "best.json").read_text().replace("4", "5"))
    assert minigpt.load(run).path.name == "step-00000012"
    assert "best.json: was altered" in capsys.readouterr().err


def test_patience_ends_a_run_and_a_resume_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    patient = {**WATCHED, "eval__patience": 3, "sample__max_new_tokens": 2}
    with validating_to(monkeypatch, LOSSES) as validated:
        run, rows = run_and_read(tiny_run(tmp_path, "whole", **patient))
        assert validated == [2, 4, 6, 8, 10]
        assert rows[-1]["step"] == 10 and steps_of(run)[-1] == 10
        assert (run / "samples/step-00000010.txt").is_file()
        assert "finished at step 10: no new best validation loss in 3 validations" in capsys.readouterr().err

        class Crash(Exception):
            pass

        real = runs.write_text
        with monkeypatch.context() as patched, pytest.raises(Crash):  # the record of step 4 is cut off

            def crash(path: Path, text: str) -> None:
                if '"step": 4' in text:
                    raise Crash
                real(path, text)

            patched.setattr(runs, "write_text", crash)
            train(tiny_run(tmp_path, "parts", **patient))
        assert read_best(tmp_path / "runs/parts") == Best(2, 3.0)
        _, parts = run_and_read(tiny_run(tmp_path, "parts", **patient))
        assert read_best(tmp_path / "runs/parts") == Best(4, 2.0)
        assert losses(parts) == losses(rows)

        before = (run / "metrics.jsonl").read_bytes()
        capsys.readouterr()
        train(tiny_run(tmp_path, "whole", **patient))  # finished: says so and leaves everything as it is
        assert (run / "metrics.jsonl").read_bytes() == before
        told = capsys.readouterr().err
        assert "finished at step 10, after 3 validations without a better loss than 2.0000 (step 4)" in told
        _, more = run_and_read(tiny_run(tmp_path, "whole", **{**patient, "eval__patience": 0}))
        _, never = run_and_read(tiny_run(tmp_path, "never", **WATCHED))
        assert losses(more) == losses(never)
        assert read_best(run) == read_best(tmp_path / "runs/never") == Best(4, 2.0)


def test_a_lost_best_checkpoint_is_made_again_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with validating_to(monkeypatch, {**LOSSES, 12: 1.0}):
        run, rows = run_and_read(tiny_run(tmp_path, **WATCHED))
        assert read_best(run) == Best(12, 1.0)
        shutil.rmtree(run / "checkpoints/step-00000012")
        _, again = run_and_read(tiny_run(tmp_path, **WATCHED))  # from step 10, where 4 was the best
    assert losses(again) == losses(rows)
    assert read_best(run) == Best(12, 1.0)
    assert steps_of(run) == [10, 12]


def test_the_standing_by_hand() -> None:
    def row(step: int, loss: float | None) -> dict:
        return {"step": step, "val/loss": loss}

    rows = [row(1, 3.0), {"step": 1, "train/loss": 9.0}, row(2, 2.0), row(3, None), row(4, 2.0), row(5, 1.0)]
    assert standing_at(0, rows, None) == Standing()
    assert standing_at(4, rows, None) == Standing(2, 2.0, since=2)  # NaN and an equal loss are no better ones
    assert standing_at(4, rows, Best(5, 1.0)) == Standing(2, 2.0, since=2)  # a record of what is yet to come
    assert standing_at(5, rows, Best(2, 2.0)) == Standing(5, 1.0, since=0)
    assert standing_at(5, rows[5:], Best(2, 0.5)) == Standing(2, 0.5, since=1)  # rows were lost
    assert Standing().after(3, math.nan) == Standing(since=1)
    assert Standing(2, 2.0).after(2, 2.0) == Standing(2, 2.0)  # its row was lost in a power cut, best.json was not
    assert [Standing(2, 2.0, since=2).exhausted(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]


def test_two_processes_run_out_of_patience_at_the_same_step(tmp_path: Path) -> None:
    """A learning rate that only makes it worse; both processes end well, which they would not at different steps."""
    config = tiny_run(
        tmp_path,
        trainer__devices=2,
        trainer__max_steps=40,
        optimizer__learning_rate=3.0,
        optimizer__schedule="constant",
        eval__every=2,
        eval__patience=2,
        optimizer__ema_decay=0.1,
    )
    assert set(forked(config).values()) == {0}
    run = tmp_path / "runs/run"
    rows = read_metrics(run / "metrics.jsonl")
    values = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    best = min(values, key=lambda step: values[step])
    last = max(values)
    assert last == best + 4 < 40
    assert read_best(run) == Best(best, values[best])
    assert steps_of(run)[-1] == last


def test_pruning_keeps_the_best_and_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        trials.save(tmp_path, step)
    read: list[Path] = []
    real = manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda path: (read.append(path), real(path))[1])
    prune(tmp_path, keep=2, best=4)
    assert steps_of(tmp_path) == [4, 5] and not read
    config = tmp_path / "checkpoints/step-00000005/config.json"
    config.write_text(config.read_text().replace("4", "5"))  # as long as before, and noticed all the same
    prune(tmp_path, keep=1)
    assert steps_of(tmp_path) == [4, 5]
    assert config in read
    trials.save(tmp_path, 6)  # read back after the save
    assert tmp_path / "checkpoints/step-00000006/model.safetensors" in read


def test_a_record_of_the_best_is_whole_or_none(tmp_path: Path) -> None:
    record_best(tmp_path, Best(7, 1.5))
    whole = (tmp_path / "best.json").read_bytes()
    assert read_best(tmp_path) == Best(7, 1.5)
    missed = [
        what
        for what, content in disks.damages(whole, 200, random.Random(0))
        if (tmp_path / "best.json").write_bytes(content) and read_best(tmp_path) is not None
    ]
    assert not missed
