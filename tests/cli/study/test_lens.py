"""The verb for lenses, as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt.cli.main import main
from minigpt.internals.study import Study
from minigpt.sampling.run import load
from minigpt.training.launch import train
from training_runs import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    return train(tiny_run(tmp_path_factory.mktemp("lens")))


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run the verb; (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["lens", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_lens_is_a_table_or_json(trained: Path, said, tmp_path: Path) -> None:
    code, out, _ = said(str(trained), "the cat")
    assert code == 0
    assert out.splitlines()[1].split() == ["t", "h", "e", "␣", "c", "a", "t"]
    file = tmp_path / "lens.html"
    arguments = ("--stat", "entropy", "--at", "resid_post", "--json", "-o", str(file))
    told = json.loads(said(str(trained), "--text", "the cat", *arguments)[1])
    study = Study(load(trained))
    assert told["values"] == study.logit_lens("the cat", "resid_post", "entropy").values.tolist()
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_lenses_that_learn_are_made_and_then_read(trained: Path, said) -> None:
    for kind, more in (("tuned", ("--steps", "2", "--tokens", "64")), ("jacobian", ("--tokens", "64"))):
        code, _, err = said(str(trained), "the", "--kind", kind)
        assert code == 5 and f"fit the lens with minigpt lens {trained} --kind {kind} --train" in err
        code, out, err = said(str(trained), "--kind", kind, "--train", *more)
        assert code == 0 and f"{kind} kl" in out, err
        code, out, _ = said(str(trained), "the", "--kind", kind)
        assert code == 0 and out.startswith(f"{kind} lens")
    assert said(str(trained), "--kind", "tuned", "--train", "--steps", "0")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a run and a text"),
        (("the", "--stat", "best"), "'top', 'probability'"),
        (("the", "--at", "attn_out"), "expected some of resid_pre"),
        (("the", "--answer", "ab"), "expected exactly one"),
        (("the", "--steps", "3"), "is for --train"),
        (("--train",), "the logit lens learns nothing"),
        (("the", "--train", "--kind", "tuned"), "leave the text out"),
        (("--train", "--kind", "jacobian", "--steps", "3"), "is for the tuned lens"),
        (("the", "-o", "lens.png"), "ends in .json, .csv, .npz or .html"),
    ],
)
def test_a_mistake_is_one_line(trained: Path, said, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = said(str(trained), *arguments)
    assert code in (2, 4)
    assert not out
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("verb", [["inspect", "nowhere", "x"], ["lens", "nowhere", "x"], ["dynamics", "nowhere"]])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in (("none/page.html", "there is no folder"), ("page.pdf", "expected a name that ends in")):
        assert main([*verb, "-o", str(tmp_path / name)]) == 2
        assert told in capsys.readouterr().err
