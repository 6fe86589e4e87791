"""Plug-ins on the command line: train, stop, resume, two processes, sample, eval, inspect; and without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import minigpt
from minigpt.cli.main import main
from minigpt.tokenizer.config import KINDS
from minigpt.training.run.metrics import read_metrics
from plugged import FOLDER, flags, forgetting

SMALL = [
    "--model.n_layer",
    "2",
    "--model.n_head",
    "2",
    "--model.n_embd",
    "16",
    "--model.block_size",
    "16",
    "--batch.tokens",
    "128",
    "--eval.every",
    "0",
    "--sample.max_new_tokens",
    "0",
    "--trainer.precision",
    "32-true",
    "--trainer.accelerator",
    "cpu",
    "--trainer.threads",
    "1",
    "--tokenizer.kind",
    "byte",
    "--optimizer.learning_rate",
    "1e-3",
    "--optimizer.warmup_steps",
    "1",
]
PARTS = [
    "--model.norm",
    "dyt",
    "--model.norm.alpha",
    "0.6",
    "--model.position",
    "linear_bias",
    "--model.activation",
    "leaky_relu2",
    "--model.activation.slope=0.2",
    "--optimizer.name",
    "lion",
    "--optimizer.name.decay",
    "0.0",
    "--optimizer.schedule",
    "restarts",
    "--optimizer.schedule.cycles",
    "3",
    "--losses.z_loss",
    "1e-4",
    "--losses.z_loss.power",
    "2",
    "--data.reader.csv.column",
    "body",
]
CHOSEN = ("dyt", "linear_bias", "leaky_relu2", "lion", "restarts", "z_loss", "csv_reader")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgetting():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/a, trained for 4 steps with every kind of plug-in."""
    folder = tmp_path_factory.mktemp("plugged")
    (folder / "d.csv").write_text("body,n\n" + "".join(f"the cat {n} sat on the mat,{n}\n" for n in range(80)))
    with pytest.MonkeyPatch.context() as patched, forgetting():
        patched.chdir(folder)
        words = ["train", *flags(*CHOSEN), *SMALL, *PARTS, "--data.source", "d.csv", "--run_name", "a"]
        assert main([*words, "--trainer.max_steps", "4"]) == 0
    return folder


def fresh(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_what_was_chosen_is_stored(trained: Path) -> None:
    stored = yaml.safe_load((trained / "runs/a/config.yaml").read_text())
    assert stored["model"]["settings"] == {"norm.alpha": 0.6, "activation.slope": 0.2}
    assert stored["optimizer"]["settings"] == {"name.decay": 0.0, "schedule.cycles": 3}
    assert stored["losses"] == {"z_loss": 1e-4, "z_loss.power": 2}
    assert stored["data"]["settings"] == {"reader.csv.column": "body"}
    assert stored["plugins"] == [str(FOLDER / f"{name}.py") for name in CHOSEN]
    needs = json.loads((trained / "runs/a/checkpoints/step-00000004/config.json").read_text())["minigpt"]["needs"]
    parts = {"norm 'dyt'": "dyt", "position 'linear_bias'": "linear_bias", "activation 'leaky_relu2'": "leaky_relu2"}
    assert needs == {"parts": parts}


def test_every_verb_opens_the_run_with_its_plugins(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fresh(trained, tmp_path, monkeypatch)
    assert main(["train", *flags(*CHOSEN), "--run_name", "a", "--trainer.max_steps", "6"]) == 0
    assert [row["step"] for row in read_metrics(Path("runs/a/metrics.jsonl")) if "train/z_loss" in row][-1] == 6
    capsys.readouterr()
    assert main(["sample", "runs/a", *flags(), "--prompt", "the", "--top_gap", "4", "--show_order"]) == 0
    assert "TopGap(n=4, keep=1)" in capsys.readouterr().out
    assert main(["sample", "runs/a", *flags(), "--prompt", "the", "--top_gap", "4", "--max_new_tokens", "3"]) == 0
    assert main(["eval", "runs/a", *flags(*CHOSEN)]) == 0
    assert main(["inspect", "runs/a", "the cat", *flags(), "-o", "page.html"]) == 0
    assert "attention entropy" in Path("page.html").read_text()
    capsys.readouterr()
    assert main(["attention_entropy", "runs/a", "the cat", *flags(), "--skip", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["title"] == "attention entropy" and len(shown["values"]) == 2
    assert main(["plan", *flags(*CHOSEN), *SMALL, *PARTS, "--data.source", "d.csv", "--measure", "true"]) == 0


def test_without_the_plugins_the_run_names_them(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fresh(trained, tmp_path, monkeypatch)
    for words, code in ((["sample", "runs/a"], 5), (["eval", "runs/a"], 5), (["train", "--run_name", "a"], 2)):
        assert main(words) == code
        said = capsys.readouterr().err
        assert "model.norm: 'dyt' is not one of layernorm, rmsnorm" in said and len(said.splitlines()) == 1
        assert "give --plugins for each, which runs its code" in said and str(FOLDER / "lion.py") in said


def test_other_code_under_the_same_name_is_found(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fresh(trained, tmp_path, monkeypatch)
    code = (FOLDER / "leaky_relu2.py").read_text().replace("square()", "relu()")
    Path("leaky_relu2.py").write_text(code)
    words = [*flags(*(name for name in CHOSEN if name != "leaky_relu2")), "--plugins", "leaky_relu2.py"]
    assert main(["sample", "runs/a", *words]) == 5
    assert "this is not the model that was saved: its logits differ by up to" in capsys.readouterr().err


def test_nothing_of_a_run_is_imported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    here = fresh(trained, tmp_path, monkeypatch)
    (here / "mine.py").write_text("raise SystemExit('code of a run was run')")
    for path in here.rglob("*.yaml"):
        stored = yaml.safe_load(path.read_text())
        if "plugins" in stored:
            path.write_text(yaml.safe_dump({**stored, "plugins": [str(here / "mine.py"), "mine"]}))
    assert main(["train", "--run_name", "a"]) == 2
    checkpoint = here / "runs/a/checkpoints/step-00000004"
    (checkpoint / "manifest.json").unlink()  # else the altered file is found first
    capsys.readouterr()
    assert main(["sample", str(checkpoint)]) == 5
    assert f"{here / 'mine.py'}, mine" in capsys.readouterr().err


def test_two_processes_have_the_plugins(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(trained, tmp_path, monkeypatch)
    words = ["train", *flags(*CHOSEN), *SMALL, *PARTS, "--data.source", "d.csv", "--run_name", "two"]
    assert main([*words, "--trainer.devices", "2", "--trainer.max_steps", "4"]) == 0
    one, two = (read_metrics(Path(f"runs/{name}/metrics.jsonl")) for name in ("a", "two"))
    for key in ("train/loss", "train/z_loss"):
        values = [[row[key] for row in rows if key in row] for rows in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_a_config_file_names_plugins(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    here = fresh(trained, tmp_path, monkeypatch)
    config = {"plugins": [str(FOLDER / "dyt.py")], "model": {"norm": "dyt", "settings": {"norm.alpha": 0.25}}}
    (here / "mine.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["train", "--config", "mine.yaml", "--model.norm.alpha", "0.5", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["settings"] == {"norm.alpha": 0.5} and printed["plugins"] == [str(FOLDER / "dyt.py")]


def test_help_lists_what_is_registered(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", *flags(*CHOSEN), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "dyt (weight * tanh(alpha x) + bias)" in shown
    for flag in ("--model.norm.alpha FLOAT", "--losses.z_loss VALUE", "--data.reader.csv.column STR"):
        assert flag in shown
    assert main([*flags("entropy"), "--help"]) == 0
    assert "attention_entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plugins", "nowhere_at_all"], "plugins: nowhere_at_all cannot be imported (ModuleNotFoundError"),
        (["--plugins", "nowhere.py"], "plugins: there is no file"),
        (["train", "--plugins"], "--plugins: expected a module or a .py file after it"),
        (["train", *flags("dyt"), "--model.norm", "dyt", "--model.norm.alhpa", "1"], "did you mean alpha?"),
        (["train", *flags("dyt"), "--model.norm", "dyt", "--model.norm.alpha", "x"], "'x' is not a number"),
        (["train", *flags("dyt"), "--model.norm.alpha"], "--model.norm.alpha: expected a value after it"),
        (["train", "--losses.z_loss", "1"], "losses: 'z_loss' is unknown: no loss is registered"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_plugin_that_fails_or_takes_a_name_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    assert main(["train", "--plugins", str(tmp_path / "broken.py")]) == 2
    assert "broken.py cannot be imported (ZeroDivisionError: division by zero)" in capsys.readouterr().err
    (tmp_path / "taken.py").write_text("import minigpt\nminigpt.register('norm', 'rmsnorm')(int)")
    assert main(["train", "--plugins", str(tmp_path / "taken.py")]) == 2
    assert "norm 'rmsnorm' exists already (from minigpt)" in capsys.readouterr().err
    (tmp_path / "unknown.py").write_text("import minigpt\nminigpt.register('nrom', 'x')(int)")
    assert main(["train", "--plugins", str(tmp_path / "unknown.py")]) == 2
    assert "register: kind 'nrom' is not one of norm, position" in capsys.readouterr().err


def test_a_tokenizer_a_logger_and_a_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.txt").write_text("the cat sat on the m\u00e4t " * 60)
    words = ["train", *flags("ascii", "rows"), *SMALL, "--data.source", "d.txt", "--run_name", "a", "--log", "csv"]
    chosen = ["--tokenizer.kind", "ascii", "--tokenizer.kind.unknown", "*", "--trainer.max_steps", "3"]
    assert main([*words, *chosen, "--trainer.log_every_n_steps", "1"]) == 0
    lines = Path("runs/a/csv/metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0] and len(lines) >= 4
    capsys.readouterr()
    assert main(["vocab", "runs/a", "--first", "2", *flags("ascii", "vocab")]) == 0
    assert capsys.readouterr().out.split() == ["0", "b'\\x00'", "1", "b'\\x01'"]
    run = minigpt.load("runs/a")
    assert run.tokenizer.decode(run.tokenizer.encode("m\u00e4t")) == "m*t"
    with forgetting():
        KINDS.rows = {name: row for name, row in KINDS.rows.items() if row.module is None}
        assert main(["sample", "runs/a"]) == 4
    assert "tokenizer kind 'ascii' is not one of byte, char" in capsys.readouterr().err
