"""A resumed run is the run that was never stopped, to the bit."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt.errors import ConfigError, Interrupted
from minigpt.training import launch
from minigpt.training.run.agreement import Agreement
from minigpt.training.run.each_step import EachStep
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.settle import settle
from training_runs import assert_equal_to_the_bit, losses, run_and_read, saved_tensors, tiny_run

# Everything on that could disturb: dropout, accumulation, validation, samples, and an epoch that ends in between.
BUSY = {
    "model__dropout": 0.2,
    "batch__tokens": 512,
    "batch__micro_batch_size": 8,
    "eval__every": 2,
    "sample__every": 3,
    "sample__max_new_tokens": 4,
    "trainer__max_steps": 12,
    "checkpoint__every": 100,
}
RECIPES = {
    "gpt2": {"model__preset": "gpt2"},
    "muon": {"model__preset": "modern", "optimizer__name": "muon", "optimizer__schedule": "wsd"},
    "averaged": {
        "model__preset": "modern",
        "optimizer__name": "muon",
        "optimizer__ema_decay": 0.8,
        "eval__patience": 4,
    },
}


@pytest.fixture(scope="module", params=RECIPES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[dict]]:
    """A recipe, and its run that was left alone."""
    folder = tmp_path_factory.mktemp(request.param)
    run, rows = run_and_read(tiny_run(folder, "whole", **BUSY, **RECIPES[request.param]))
    epochs = [row["epoch"] for row in rows if "epoch" in row]
    assert rows[-1]["step"] == 12 and epochs[5] < 1 < epochs[8]
    return request.param, run, rows


@pytest.mark.parametrize("stop", [1, 5, 6, 12])  # validation and a sample are due at 6 and 12
def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(
    whole: tuple[str, Path, list[dict]], stop: int, tmp_path: Path, monkeypatch
) -> None:
    recipe, whole_run, whole_rows = whole
    config = tiny_run(tmp_path, "parts", **BUSY, **RECIPES[recipe])
    with monkeypatch.context() as patched, pytest.raises(Interrupted) as raised:
        patched.setattr(Agreement, "on_step_end", stopping_at(stop))
        launch.train(config)
    assert raised.value.exit_code == 143
    torch.manual_seed(987)  # whatever happened in between
    parts, parts_rows = run_and_read(config)
    assert losses(parts_rows) == losses(whole_rows)
    values = [[row["val/loss"] for row in rows if "val/loss" in row] for rows in (whole_rows, parts_rows)]
    assert values[0] == values[1]
    assert_equal_to_the_bit(saved_tensors(parts, 12), saved_tensors(whole_run, 12))
    for path in (whole_run / "samples").iterdir():
        assert (parts / "samples" / path.name).read_text() == path.read_text()


def test_a_run_stopped_while_its_minutes_are_planned_says_how_to_go_on(tmp_path: Path, monkeypatch) -> None:
    config = replace(tiny_run(tmp_path, "a run"), minutes=1.0)
    monkeypatch.setattr(Agreement, "on_step_end", stopping_at(1))
    said = f"stopped by SIGTERM; resume with --run_name 'a run' --resume auto --runs_dir {tmp_path / 'runs'}"
    with pytest.raises(Interrupted, match=f"^{said}$"):
        launch.train(config)


def stopping_at(stop: int):
    """An Agreement.on_step_end that receives SIGTERM during step `stop`."""
    real = Agreement.on_step_end

    def on_step_end(self: Agreement, trainer, module, step: int) -> None:
        if step == stop:
            self.received = signal.SIGTERM
        real(self, trainer, module, step)

    return on_step_end


def test_a_crash_between_saves_repeats_the_steps_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {**BUSY, "checkpoint__every": 4, "eval__every": 4}
    whole, whole_rows = run_and_read(tiny_run(tmp_path, "whole", **changes))

    class Crash(Exception):
        pass

    real = EachStep.on_train_batch_end

    def crash(self, trainer, *arguments) -> None:
        real(self, trainer, *arguments)
        if trainer.global_step == 7 and type(self).__name__ == "Samples":
            raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(EachStep, "on_train_batch_end", crash)
        launch.train(tiny_run(tmp_path, "parts", **changes))
    parts, parts_rows = run_and_read(tiny_run(tmp_path, "parts", **changes))
    assert losses(parts_rows) == losses(whole_rows)
    assert [row["step"] for row in read_metrics(parts / "metrics-past-00000004.jsonl")] == [5, 6, 7]
    assert_equal_to_the_bit(saved_tensors(parts, 12), saved_tensors(whole, 12))


def test_a_validation_missed_by_a_kill_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.training.run.observing import Validation

    class Crash(Exception):
        pass

    def crash(*arguments) -> None:
        raise Crash

    changes = {**BUSY, "checkpoint__every": 4, "trainer__max_steps": 6}
    _, whole_rows = run_and_read(tiny_run(tmp_path, "whole", **changes))
    with monkeypatch.context() as patched, pytest.raises(Crash):
        real = Validation._validate
        patched.setattr(
            Validation, "_validate", lambda self, t, m, step: crash() if step == 4 else real(self, t, m, step)
        )
        launch.train(tiny_run(tmp_path, "parts", **changes))
    _, rows = run_and_read(tiny_run(tmp_path, "parts", **changes))
    kept = [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
    assert kept == [(row["step"], row["val/loss"]) for row in whole_rows if "val/loss" in row]


def test_a_run_trains_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    changes = {**BUSY, "checkpoint__every": 4}
    whole, whole_rows = run_and_read(tiny_run(tmp_path, "whole", **changes))
    parts, _ = run_and_read(tiny_run(tmp_path, "parts", **changes))
    with open(parts / "checkpoints/step-00000012/model.safetensors", "ab") as file:
        file.write(b"x")
    _, rows = run_and_read(tiny_run(tmp_path, "parts", **changes))
    assert losses(rows) == losses(whole_rows)
    assert_equal_to_the_bit(saved_tensors(parts, 12), saved_tensors(whole, 12))
    assert len(list((parts / "checkpoints").glob("damaged-step-00000012-*"))) == 1


def test_a_lost_config_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, optimizer__schedule="constant", trainer__max_steps=5)
    run, _ = run_and_read(config)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="exists already"):
        launch.train(replace(config, resume="never"))
    with pytest.raises(ConfigError, match=r"model\.n_layer 2 -> 3"):
        launch.train(tiny_run(tmp_path, trainer__max_steps=5, model__n_layer=3))
    _, rows = run_and_read(replace(config, trainer=replace(config.trainer, max_steps=7)))
    assert len(losses(rows)) == 7
    assert (run / "config.yaml").is_file()


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with ExitStack() as first, ExitStack() as second:
        settle(config, first)
        with pytest.raises(ConfigError, match=r"in use by process \d+ on"):
            settle(config, second)
    launch.train(config)


def test_runs_without_a_name_never_share_a_folder(tmp_path: Path) -> None:
    config = replace(tiny_run(tmp_path, trainer__max_steps=1), run_name=None)
    assert len({launch.train(config) for _ in range(3)}) == 3


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    run, _ = run_and_read(config)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: 3 is less than the 8 steps"):
        launch.train(replace(config, trainer=replace(config.trainer, max_steps=3)))
    assert (run / "config.yaml").read_bytes() == before


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, optimizer__schedule="constant", trainer__max_steps=5)
    run_and_read(config)
    _, rows = run_and_read(replace(config, trainer=replace(config.trainer, max_steps=9)))
    _, whole = run_and_read(tiny_run(tmp_path, "whole", optimizer__schedule="constant", trainer__max_steps=9))
    assert losses(rows) == losses(whole)
