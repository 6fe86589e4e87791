"""The verbs heads and patch: what they print, and what they refuse in one line."""

from __future__ import annotations

import json

import pytest

from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.tokenizer.plain import CharTokenizer
from planted import induction_model

TEXTS = ["--clean", "abcdab", "--corrupted", "axcdab"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("heads") / "planted"
    return str(save_checkpoint(folder, induction_model(26, 26), CharTokenizer(list("abcdefghijklmnopqrstuvwxyz"))))


def test_heads_prints_a_table_of_scores_and_effects(run: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["heads", run]) == 0
    out = capsys.readouterr().out
    assert "Δloss (nats)" in out and "most induction  L1H2" in out and "\n  L0H1       1.000" in out
    assert main(["heads", run, "--json", "--kinds", "previous,duplicate", "--causal", "false", "--text", "abcabc"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["axes"][1]["labels"] == ["previous", "duplicate"]
    assert table["values"][1][0] == pytest.approx(1.0, abs=0.01)


def test_patch_prints_the_change_at_each_site(run: str, capsys: pytest.CaptureFixture) -> None:
    # After "ab" came c; with another letter before the c nothing says so.
    for more in (["--at", "z"], ["--at", "k", "--by", "head,pos", "--guess"], ["--versus", "d"]):
        assert main(["patch", run, *TEXTS, "--answer", "c", *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        names = [axis["name"] for axis in found["axes"]]
        if "z" in more:
            assert names == ["layer", "head"]
            whole = found["notes"]["clean"] - found["notes"]["corrupted"]
            assert found["values"][1][2] == pytest.approx(whole, rel=0.1) and whole > 1
        else:
            assert names == (["way", "layer", "head", "pos"] if "k" in more else ["layer", "pos"])
    assert main(["patch", run, *TEXTS, "--answer", "c"]) == 0
    assert "1 b|x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["heads", "--kinds", "inductive"], 2, "kind 'inductive': expected one of previous"),
        (["heads", "--text", "abc", "--kinds", "duplicate"], 4, "or one with repetitions"),
        (["heads", "--offset", "99"], 2, "offset: 99"),
        (["heads", "--text", "abc" * 9], 2, "27 tokens do not fit"),
        (["patch", *TEXTS], 2, "--answer: not given"),
        (["patch", *TEXTS[:3], "abc", "--answer", "c"], 4, "1 x 6 tokens and 1 x 3 tokens"),
        (["patch", *TEXTS, "--answer", "cd"], 4, "'cd': is 2 tokens"),
        (["patch", *TEXTS, "--answer", "c", "--at", "zz"], 2, "at: 'zz'; expected one of resid_pre"),
        (["patch", *TEXTS, "--answer", "c", "--by", "head"], 2, "expected any of pos for"),
        (["patch", *TEXTS, "--answer", "c", "--position", "9"], 2, "position: 9 is outside the text; expected -6 .. 5"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    run: str, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([arguments[0], run, *arguments[1:]]) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_text_in_which_nothing_repeats_has_the_other_kinds(run: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["heads", run, "--text", "abc"]) == 0
    told = capsys.readouterr()
    assert "no duplicate scores: no position of this text" in told.err and "no induction scores" in told.err
    assert "previous" in told.out and "duplicate" not in told.out
    assert main(["heads", run, "--text", "ab"]) == 0
    assert "no offset scores: the text has 2 tokens" in capsys.readouterr().err
