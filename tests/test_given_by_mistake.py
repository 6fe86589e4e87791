"""What nobody means: empty paths, words that YAML takes for numbers, ids that are none, packages that are missing."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.cli.main import main
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, DataError, MissingExtra
from minigpt.internals.dynamics.series import of_checkpoints, of_run
from minigpt.internals.features.autoencoder import Autoencoder
from minigpt.tokenizer.build import load_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.training.launch import train
from toys import random_model, tiny_config
from training_runs import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.txt, data/ and runs/run, which names them by their places."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_run(folder, optimizer__schedule="constant"))
    return folder


def test_an_empty_path_is_never_the_current_folder(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Even where the current folder is what was asked for: a checkpoint, a run, a text."""
    shutil.copytree(trained / "runs/run", tmp_path / "here")
    for file in (tmp_path / "here/checkpoints/step-00000008").iterdir():
        shutil.copy(file, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(Path().rglob("*"))
    for argv in (
        *([verb, ""] for verb in ("sample", "eval", "info", "heads", "dynamics")),
        *([verb, "", "text"] for verb in ("inspect", "lens")),
        ["sae", "", "show"],
        ["sae", ".", "train", "--autoencoder", ""],
        ["patch", "", "--clean", "a", "--corrupted", "b", "--answer", "c"],
        ["train", "--config", ""],
        ["train", "--config="],
        ["sample", "--config", ""],
        ["train", "--tokenizer.path", ""],
        ["prepare", "--data.source", ""],
        ["eval", ".", "--data.source", ""],
        ["eval", ".", "--data.folder", ""],
        ["sample", ".", "--steer", ""],
        ["plan", "--data.source", ""],
        *(["train", f"--{name}", ""] for name in ("run_name", "runs_dir", "data.source", "data.folder", "data.file")),
    ):
        code = main(argv)
        told = capsys.readouterr().err
        assert code in (2, 5), (argv, told)
        assert told.startswith("minigpt: ") and told.count("\n") == 1, (argv, told)
    for call in (
        minigpt.load,
        minigpt.Study,
        of_run,
        lambda path: next(of_checkpoints(path)),
        load_tokenizer,
        open_corpus,
        Autoencoder.load,
    ):
        for nothing in ("", None, 3):
            with pytest.raises(ConfigError, match=": expected the path of"):
                call(nothing)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"expected a run, got GPT; give a model to Study\.of"):
        minigpt.Study(minigpt.load(".").model)  # type: ignore[arg-type]
    assert sorted(Path().rglob("*")) == before


def test_words_that_yaml_takes_for_numbers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for text, told in (
        ("run_name: 007", r"Got value: 7; put it into quotes, so that YAML takes it for text"),
        ("run_name: true", r"Got value: True; put it into quotes"),
        ("trainer:\n  max_steps: 1.5", "Expected a whole number. Got value: 1.5"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


@pytest.mark.parametrize("ids", [torch.ones(3, dtype=torch.bool), [True, False], torch.ones(3), torch.ones(3) * 1j])
def test_ids_that_are_no_whole_numbers_are_refused_by_their_type(ids: object) -> None:
    study = minigpt.Study.of(random_model(tiny_config("gpt2")))
    with pytest.raises(DataError, match=r"token ids: have dtype torch\.(bool|float32|complex64); expected an integer"):
        study.logits(ids)  # type: ignore[arg-type]
    if isinstance(ids, torch.Tensor):
        with pytest.raises(DataError, match="have dtype"):
            study.top_contexts(("resid_post", 0), text=ids)


# Packages that were asked for.


@pytest.mark.parametrize(
    ("package", "changes", "told"),
    [
        ("tensorboard", {"log": "tensorboard"}, r"log: tensorboard needs .*'minigpt-lab\[tensorboard\]'"),
        ("wandb", {"log": "wandb"}, r"log: wandb needs .* pip install wandb$"),
        ("zstandard", {"source": "texts"}, r"reading .*b\.txt\.zst needs .*'minigpt-lab\[zstd\]'"),
    ],
)
def test_a_package_that_is_asked_for_and_missing_stops_a_run_before_it_begins(
    package: str, changes: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, **({"log": changes["log"]} if "log" in changes else {}))
    if "source" in changes:  # the first file could be read, and is not
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts/a.jsonl").write_text("no JSON")
        (tmp_path / "texts/b.txt.zst").write_bytes(b"")
        config = replace(config, data=replace(config.data, source=str(tmp_path / "texts")))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MissingExtra, match=told) as raised:
        train(config)
    assert raised.value.exit_code == 2 and "which is not installed" in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_that_is_broken_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot\\nbe created')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MissingExtra, match=r"which cannot be imported \(Descriptors cannot be created\); install it"):
        train(tiny_run(tmp_path, log="wandb"))


def test_a_vocabulary_that_is_missing_is_told_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.tokenizer.published._places", lambda vocabulary: [])
    monkeypatch.setattr("minigpt.tokenizer.published._download", lambda *_: (_ for _ in ()).throw(OSError("no net")))
    monkeypatch.setattr("minigpt.data.prepare.survey", lambda *_: pytest.fail("the text was read"))
    config = replace(tiny_run(tmp_path), tokenizer=TokenizerConfig(kind="gpt2"))
    with pytest.raises(DataError, match=r"pip install 'minigpt-lab\[vocab\]'"):
        train(config)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()
