"""A run that is read while it trains: its checkpoint goes between being chosen and being read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import minigpt
from minigpt.checkpoint import runs
from minigpt.checkpoint.runs import TRIES, Best, Replaced, checkpoints_of, record_best, step_of
from minigpt.checkpoint.saving import save_checkpoint, state_of
from minigpt.cli.main import main
from minigpt.data.config import DataConfig
from minigpt.errors import CheckpointError
from minigpt.evaluation.text import evaluate_run
from minigpt.internals.dynamics.series import of_checkpoints
from minigpt.tokenizer.plain import ByteTokenizer
from minigpt.training.launch import train
from toys import random_model, tiny_config
from training_runs import assert_equal_to_the_bit, corpus_file, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.txt, data/ and runs/run, which names them by their places."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_run(folder, optimizer__schedule="constant"))
    return folder


def save(run: Path, step: int) -> Path:
    """A checkpoint whose weights follow from its step, recorded as the best, as a training run does it."""
    folder = run / f"checkpoints/step-{step:08d}"
    model = random_model(tiny_config("gpt2", vocab_size=257), seed=step)
    save_checkpoint(folder, model, ByteTokenizer(), state={"step": step, "corpus": f"of {step}"})
    record_best(run, Best(step, 1 / step))
    return folder


def going(monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], object], times: int = 1) -> list[Path]:
    """Whenever a checkpoint is chosen, up to so many times, this happens before it is read."""
    chosen: list[Path] = []
    real = runs.find_checkpoint

    def choose(path: Path | str, say: runs.Say = runs.silent) -> Path:
        chosen.append(real(path, say))
        if len(chosen) <= times:
            then(chosen[-1])
        return chosen[-1]

    monkeypatch.setattr(runs, "find_checkpoint", choose)
    return chosen


def replaced(folder: Path) -> None:
    """As pruning does it, after a better checkpoint was saved."""
    save(folder.parent.parent, step_of(folder) + 1)
    os.rename(folder, folder.with_name(f".tmp-{folder.name}-pruned"))


@pytest.mark.parametrize("half", [False, True])
def test_a_run_is_read_from_the_checkpoint_that_stands(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, 1)
    if half:  # it goes in the middle of being read, after the weights
        chosen: list[Path] = []
        real = minigpt.checkpoint.checkpoint.read_weights

        def read_weights(folder: Path) -> object:
            found = real(folder)
            if not chosen:
                replaced(folder)
            chosen.append(folder)
            return found

        monkeypatch.setattr(minigpt.checkpoint.checkpoint, "read_weights", read_weights)
    else:
        chosen = going(monkeypatch, replaced)
    run = minigpt.load(tmp_path)
    assert [step_of(folder) for folder in chosen] == [1, 2]
    assert run.path == checkpoints_of(tmp_path)[0] and run.state["step"] == 2
    expected = random_model(tiny_config("gpt2", vocab_size=257), seed=2)
    assert_equal_to_the_bit(state_of(run.model), state_of(expected))
    assert capsys.readouterr().err == ""  # nothing was damaged


def test_a_checkpoint_that_becomes_another_under_its_name_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one and config of another would be a model that never was."""
    save(tmp_path / "other", 2)
    folder = save(tmp_path, 1)
    real = minigpt.checkpoint.checkpoint.read_weights

    def read_weights(path: Path) -> object:
        found = real(path)
        if (tmp_path / "other").exists():
            shutil.rmtree(folder)
            os.rename(tmp_path / "other/checkpoints/step-00000002", folder)
            shutil.rmtree(tmp_path / "other")
        return found

    monkeypatch.setattr(minigpt.checkpoint.checkpoint, "read_weights", read_weights)
    run = minigpt.load(tmp_path)
    assert run.state["corpus"] == "of 2"
    expected = random_model(tiny_config("gpt2", vocab_size=257), seed=2)
    assert_equal_to_the_bit(state_of(run.model), state_of(expected))


def test_a_checkpoint_that_was_named_is_never_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    going(monkeypatch, replaced)
    with pytest.raises(CheckpointError, match=r"step-00000001: was removed or changed while it was read; try again"):
        minigpt.load(folder)
    with pytest.raises(CheckpointError, match=r"step-00000001: no such folder; .*checkpoints holds step-00000002$"):
        minigpt.load(folder)


def test_tries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    chosen = going(monkeypatch, replaced, times=1000)
    with pytest.raises(Replaced):
        minigpt.load(tmp_path)
    assert len(chosen) == TRIES


def test_an_error_of_a_checkpoint_that_stays_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    chosen = going(monkeypatch, lambda folder: None)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        minigpt.load(folder)
    assert len(chosen) == 1


def test_a_best_that_is_replaced_while_it_is_chosen_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """best.json is read, then step 1 goes: what is taken is the best of now, which is not the newest."""
    save(tmp_path, 1)
    real = runs.checkpoints_of

    def checkpoints_of(run: Path) -> list[Path]:
        folder = tmp_path / "checkpoints/step-00000001"
        if folder.is_dir():
            replaced(folder)
            save_checkpoint(tmp_path / "checkpoints/step-00000003", random_model(tiny_config("gpt2")), ByteTokenizer())
        return real(run)

    monkeypatch.setattr(runs, "checkpoints_of", checkpoints_of)
    assert minigpt.load(tmp_path).path.name == "step-00000002"
    told = capsys.readouterr().err
    assert "step 2 validated best" in told and "gone" not in told and "damaged" not in told


@pytest.mark.parametrize(
    "verb", [["sample", "--max_new_tokens", "2"], ["eval"], ["info"], ["heads"], ["lens", "The"], ["inspect", "The"]]
)
def test_every_verb_reads_a_run_in_training(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")

    def next_step(folder: Path) -> None:
        shutil.copytree(folder, folder.with_name("step-00000009"))
        record_best(folder.parent.parent, Best(9, 0.1))
        shutil.rmtree(folder)

    chosen = going(monkeypatch, next_step)
    output = ["-o", "page.html"] if verb[0] == "inspect" else []
    run = [] if verb[0] in ("sample", "eval", "info", "heads") else ["runs/run"]  # or the one trained last
    assert main([verb[0], *run, *verb[1:], *output]) == 0, capsys.readouterr().err
    assert [*dict.fromkeys(folder.name for folder in chosen)] == ["step-00000008", "step-00000009"]


def test_after_loading_nothing_more_is_read_from_the_checkpoint(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path / "all")
    run = minigpt.load(tmp_path / "all/runs/run")
    other = corpus_file(tmp_path)
    expected = evaluate_run(run)[0], evaluate_run(run, DataConfig(source=str(other), folder=str(tmp_path / "d")))[0]
    shutil.rmtree(run.path)
    shutil.rmtree(tmp_path / "d")
    assert evaluate_run(run)[0] == expected[0]
    assert evaluate_run(run, DataConfig(source=str(other), folder=str(tmp_path / "d")))[0] == expected[1]


def test_curves_leave_out_checkpoints_that_are_pruned_meanwhile(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / "all")
    folder = tmp_path / "all/runs/run/checkpoints/step-00000008"
    for step in (9, 10):
        shutil.copytree(folder, folder.with_name(f"step-{step:08d}"))
    rows = of_checkpoints(tmp_path / "all/runs/run")
    assert next(rows)["step"] == 8
    shutil.rmtree(folder.with_name("step-00000009"))
    assert [row["step"] for row in rows] == [10]
    assert "step-00000009: pruned before it was read" in capsys.readouterr().err
