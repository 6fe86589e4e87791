"""A run whose text is gone, or is another by now."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import minigpt
from minigpt.data.prepare import prepare
from minigpt.errors import ConfigError, DataError
from minigpt.evaluation.text import evaluate_run
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.training.launch import train
from training_runs import assert_equal_to_the_bit, corpus_file, run_and_read, saved_tensors, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.txt, data/ and runs/run, which names them by their places."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_run(folder, optimizer__schedule="constant"))
    return folder


@pytest.fixture
def moved(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in a folder of its own, and its text gone; data and runs lie where one stands."""
    shutil.copytree(trained / "data", tmp_path / "data")
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.setattr("minigpt.data.prepare._told", set())
    return tmp_path


def config_of(moved: Path, source: Path, **changes: object) -> minigpt.TrainConfig:
    """The config of the run, as it lies now; its text is where it was, which may be nowhere."""
    config = tiny_run(moved, optimizer__schedule="constant", trainer__max_steps=10, **changes)
    corpus_file(moved).unlink()
    return replace(config, data=replace(config.data, source=str(source)))


def let_the_text_be_gone(trained: Path, run: Path) -> Path:
    """The run was trained on a text of which there is nothing any more."""
    gone = trained.parent / "nowhere/corpus.txt"
    stored = run / "config.yaml"
    stored.write_text(stored.read_text().replace(str(trained / "corpus.txt"), str(gone)))
    return gone


def test_a_run_whose_text_is_gone_goes_on_from_what_was_prepared(
    moved: Path, trained: Path, capsys: pytest.CaptureFixture
) -> None:
    gone = let_the_text_be_gone(trained, moved / "runs/run")
    config = config_of(moved, gone)
    capsys.readouterr()
    run = train(config)
    told = capsys.readouterr().err
    [prepared] = (moved / "data/corpus").glob("byte-*")
    assert told.count(str(gone)) == told.count(str(prepared)) == 1
    assert f"using what was prepared from it: {prepared}" in told

    shutil.copytree(trained, moved / "whole")
    whole = replace(config, runs_dir=str(moved / "whole/runs"), data=replace(config.data, source=f"{moved}/corpus.txt"))
    corpus_file(moved)
    whole_run = train(whole)
    assert_equal_to_the_bit(saved_tensors(run, 10), saved_tensors(whole_run, 10))


def test_a_new_run_on_a_missing_text_is_refused_as_ever(moved: Path, trained: Path) -> None:
    gone = let_the_text_be_gone(trained, moved / "runs/run")
    config = config_of(moved, gone)
    for other in (
        replace(config, run_name="new"),
        replace(config, run_name=None),
        replace(config, data=replace(config.data, source=f"{gone}.txt")),  # a text that the run was not trained on
        replace(config, data=replace(config.data, val_fraction=0.2)),
        replace(config, tokenizer=TokenizerConfig(kind="char")),
    ):
        with pytest.raises(ConfigError, match=r"neither a file, a folder nor a known corpus; known corpora: [\w, ]+$"):
            train(other)
    assert os.listdir(moved / "runs") == ["run"]


def test_where_both_are_gone_both_places_are_named(moved: Path, trained: Path) -> None:
    gone = let_the_text_be_gone(trained, moved / "runs/run")
    config = config_of(moved, gone)
    (moved / "data").rename(moved / "elsewhere")
    with pytest.raises(DataError) as raised:
        train(config)
    assert str(gone) in str(raised.value) and str(moved / "data") in str(raised.value)
    assert "--data.folder" in str(raised.value) and "\n" not in str(raised.value)
    assert train(replace(config, data=replace(config.data, folder=str(moved / "elsewhere")))) == moved / "runs/run"


def test_a_prepared_corpus_that_was_altered_does_not_stand_in(moved: Path, trained: Path) -> None:
    gone = let_the_text_be_gone(trained, moved / "runs/run")
    [shard] = moved.glob("data/corpus/byte-*/train-00000.bin")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=r"train-00000\.bin was altered"):
        train(config_of(moved, gone))


@pytest.mark.parametrize("how", ["unreadable", "empty folder"])
def test_a_folder_that_cannot_be_read_is_a_text_that_is_gone(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "texts").mkdir()
    corpus_file(tmp_path).rename(tmp_path / "texts/one.txt")
    config = tiny_run(tmp_path, trainer__max_steps=4, optimizer__schedule="constant")
    config = replace(config, data=replace(config.data, source=str(tmp_path / "texts")))
    train(config)
    monkeypatch.setattr("minigpt.data.prepare._told", set())
    if how == "unreadable":  # to root nothing is, so the system's word is put into its mouth
        (tmp_path / "texts/two.txt").write_text("more")

        def refuse(self: Path, *arguments: object, **options: object) -> object:
            if self.is_relative_to(tmp_path / "texts"):
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *arguments, **options)

        real = Path.open
        monkeypatch.setattr(Path, "open", refuse)
    else:
        (tmp_path / "texts/one.txt").unlink()
    train(replace(config, trainer=replace(config.trainer, max_steps=5)))
    assert "using what was prepared from it" in capsys.readouterr().err


def test_a_tokenizer_file_that_is_gone_is_found_in_the_prepared_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prepared = prepare(tiny_run(tmp_path).data, TokenizerConfig(kind="bpe", vocab_size=260), show=False)
    shutil.copytree(prepared.folder, tmp_path / "tok")
    config = tiny_run(tmp_path, trainer__max_steps=4, optimizer__schedule="constant")
    config = replace(config, tokenizer=TokenizerConfig(kind="file", path=str(tmp_path / "tok/minigpt_tokenizer.json")))
    train(config)
    shutil.rmtree(tmp_path / "tok")
    train(replace(config, trainer=replace(config.trainer, max_steps=5)))
    assert "minigpt_tokenizer.json does not exist" in capsys.readouterr().err


def test_eval_of_a_run_whose_text_is_gone(
    moved: Path, trained: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    expected = evaluate_run(minigpt.load(trained / "runs/run"))[0]
    run = minigpt.load(moved / "runs/run")
    run.config["data"] |= {"source": "nowhere.txt", "folder": "data"}
    monkeypatch.chdir(moved)
    assert evaluate_run(run)[0] == evaluate_run(run)[0] == expected
    assert capsys.readouterr().err.count("using what was prepared from it") == 1
    assert len(minigpt.Study(run).heads(causal=False).table().values)
    (moved / "data").rename(moved / "elsewhere")
    with pytest.raises(DataError, match=r"'nowhere.txt' is neither .* is not in .*/data; put one of the two back"):
        evaluate_run(run)
    assert evaluate_run(run, folder="elsewhere")[0] == expected


# A text that has changed.


def test_a_new_character_is_told_as_a_change_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = replace(tiny_run(tmp_path, trainer__max_steps=2), tokenizer=TokenizerConfig(kind="char"))
    run = train(config)
    text = corpus_file(tmp_path)
    longer = replace(config, trainer=replace(config.trainer, max_steps=4))
    stored = minigpt.TrainConfig.from_dict(minigpt.load(run).config)  # as the command line starts from: 13 ids
    whole = text.read_text()
    for changed in (whole + "Z", whole + "a", whole[:150]):  # a letter more, a token more, too short for a batch
        text.write_text(changed)
        for each in (longer, replace(longer, model=stored.model)):
            with pytest.raises(DataError, match=r"corpus\.txt, or its tokenizer, has changed since .*runs/run was"):
                train(each)
        with pytest.raises(DataError, match=r"corpus\.txt has changed since"):
            evaluate_run(minigpt.load(run))


def test_metrics_of_a_run_that_went_on_without_its_text(moved: Path, trained: Path) -> None:
    """The losses go on where they stopped."""
    gone = let_the_text_be_gone(trained, moved / "runs/run")
    _, rows = run_and_read(config_of(moved, gone))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))
