"""Every command and every line of Python in docs/tutorial.md and docs/study/heads.md, in their order.

The training command is run as it stands but for its length. The rest is run on a model of the same kind whose two heads
were written by hand, where it is known what has to come out.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.tokenizer.plain import CharTokenizer
from planted import induction_model

DOCS = Path(__file__).parents[2] / "docs"
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ALPHABET = sorted("+/0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
SHORT = ["--trainer.max_steps", "4", "--eval.tokens", "256", "--batch.tokens", "128", "--internals.every", "2"]


def blocks(page: str) -> list[tuple[str, str]]:
    """What can be run of a page: (bash or python, text)."""
    found = FENCED.findall((DOCS / page).read_text(encoding="utf-8"))
    return [block for block in found if block[0] in ("bash", "python")]


def run_command(line: str, *more: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "minigpt"
    assert main([*arguments, *more]) == 0


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which runs/induction holds L0H2 and L1H1, planted."""
    monkeypatch.chdir(tmp_path)
    model = induction_model(64, 64, heads=4, previous=(0, 2), induction=(1, 1))
    return save_checkpoint(tmp_path / "runs" / "induction", model, CharTokenizer(ALPHABET))


def test_the_tutorial_trains_and_draws_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for kind, text in blocks("tutorial.md") if kind == "bash" for line in text.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == ["train", "dynamics", "heads", "patch", "patch"]
    run_command(lines[0], *SHORT)
    assert (tmp_path / "runs" / "induction" / "metrics.jsonl").is_file()
    run_command(lines[1])
    assert "Induction" in capsys.readouterr().out
    run_command(lines[2])  # the names that the page speaks of are there
    assert {f"L{layer}H{head}" for layer in range(2) for head in range(4)} <= set(capsys.readouterr().out.split())
    shutil.rmtree(tmp_path / "runs")


def test_the_tutorial_confirms_its_hypothesis_where_it_is_true(planted: Path, capsys: pytest.CaptureFixture) -> None:
    names: dict[str, Any] = {}
    printed, results = [], []
    for kind, text in blocks("tutorial.md"):
        capsys.readouterr()
        if kind == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
        elif not re.match("minigpt (train|dynamics)", text):
            run_command(text)
            run_command(text, "--json")
            results.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
        printed.append(capsys.readouterr().out)

    table, by_head, by_position = results
    columns = [axis["labels"] for axis in table["axes"]]
    worth = dict(zip(columns[0], (row[-1] for row in table["values"]), strict=True))
    assert table["notes"]["most induction"].startswith("L1H1 ") and table["notes"]["most previous"].startswith(
        "L0H2 1.00"
    )
    assert sorted(worth, key=worth.get)[-2:] in (["L1H1", "L0H2"], ["L0H2", "L1H1"])  # type: ignore[arg-type]
    looks = next(text for text in printed if text.startswith("Q 0.00"))
    assert dict(line.split() for line in looks.splitlines()[:4])["M"] > "0.80"
    first, second = map(float, re.findall(r"time (-?\d+\.\d+)", next(text for text in printed if "first time" in text)))
    assert abs(first) < 0.1 and second > 0.5
    whole = by_head["notes"]["clean"] - by_head["notes"]["corrupted"]
    assert whole > 1 and by_head["values"][1][1] == pytest.approx(whole, rel=0.05)
    token, moved = by_position["values"][0][2], by_position["values"][1][3]
    assert token == pytest.approx(whole, abs=1e-4) and moved == pytest.approx(whole, rel=0.05)
    found = names["found"]
    assert found["L0H2", "L1H1.k"] == pytest.approx(whole, rel=0.05) == found["L0H0 + L0H1 + L0H2 + L0H3", "L1H1.k"]
    assert abs(found["L0H2", "L1H1.q"]) + abs(found["L0H2", "L1H1.v"]) < 0.05 * whole


def test_every_example_of_the_page_on_heads_runs(planted: Path) -> None:
    names: dict[str, Any] = {}
    ran = [text for kind, text in blocks("study/heads.md") if kind == "python"]
    for text in ran:
        exec(compile(text, "heads.md", "exec"), names)
    methods = ("heads", "head_scores", "ov_circuit", "qk_circuit", "copying_from_weights", "composition", "rollout")
    methods += ("value_flow", "effect", "ablate", "patch", "attribution_patch", "patch_paths")
    assert all(f"study.{name}(" in "".join(ran) for name in methods)


def test_what_the_page_on_heads_says_of_kinds_and_sites_is_what_there_is() -> None:
    from minigpt.internals.causal.heads import KINDS
    from minigpt.internals.causal.patching import SITES

    page = (DOCS / "study" / "heads.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (\w+) \|", page, re.MULTILINE)) - {"kind"} == set(KINDS)
    listed = re.search(r"Sites are (.*?)\.", page)
    assert listed and re.findall(r"`(\w+)`", listed[1]) == list(SITES)
