"""The command line as a person meets it: verbs, defaults, and what it says to a mistake."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

import minigpt
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.training.launch import train
from toys import random_model, tiny_config
from training_runs import corpus_file, tiny_run

ROOT = Path(__file__).parents[2]
SPARING = ("--trainer.precision", "32-true", "--measure", "false")  # a plan that measures nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    return train(tiny_run(tmp_path_factory.mktemp("cli")))


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run the command line; (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "tran: no such verb; did you mean train?"),
        (["train", "--model.n_layr", "3"], "--model.n_layr: no such setting; did you mean --model.n_layer?"),
        (["train", "--optimizer.nam", "muon"], "--optimizer.nam: no such setting; did you mean --optimizer.name?"),
        (["train", "--n_layer", "3"], "--n_layer: no such setting; did you mean --model.n_layer?"),
        (["train", "--model.n_layer", "many"], '"model.n_layer": Expected a whole number. Got value: many'),
        (["train", "--model.preset", "gpt5"], "model.preset"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--tokenizer.kind", "bpee"], "tokenizer.kind: 'bpee' is not one of byte, char, bpe"),
        (["sample", "--temprature", "1"], "--temprature: no such setting; did you mean --temperature?"),
        (["sample", "--top_k", "2.5"], '"top_k": Expected whole number or null. Got value: 2.5'),
        (["train", "--model.norm", "x"], "model.norm: 'x' is not one of layernorm, rmsnorm"),
        (["sample", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["plan", "--model.n_head", "5"], "model.n_head: 5 does not divide n_embd (128)"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code(arguments: list[str], message: str, said) -> None:
    code, out, err = said(*arguments)
    assert message in err
    assert err.startswith("minigpt: ")
    assert err.count("\n") == 1
    assert code == (5 if "nowhere/at" in message else 2)
    assert not out


@pytest.mark.parametrize(
    "text", ["model:\n  n_layr: 3\n", "modl:\n  n_layer: 3\n", "model:\n  n_layer: 2.5\n", "- 1\n"]
)
def test_a_mistake_in_a_config_file_is_named(text: str, said, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    code, _, err = said("train", "--config", str(path))
    assert code == 2
    assert err.count("\n") == 1
    if "n_lay" in text:
        assert "n_layer" in err


def test_a_config_file_is_data_never_code(said, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/hacked']\n")
    assert said("train", "--config", str(path))[0] == 2
    assert not (tmp_path / "hacked").exists()


def test_training_needs_no_arguments(said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: Path) -> None:
    from minigpt.training import launch
    from minigpt.training.config import TrainConfig

    given: list[TrainConfig] = []

    def remember(config: TrainConfig) -> Path:
        given.append(config)
        return trained

    monkeypatch.setattr(launch, "train", remember)
    monkeypatch.chdir(tmp_path)
    code, out, err = said("train")
    assert (code, err) == (0, "")
    assert given == [TrainConfig()]
    assert "validation loss" in out


def test_every_shipped_config_is_valid() -> None:
    from minigpt.cli.arguments import add_training_settings, fields_of, make_parser, parse
    from minigpt.training.config import TrainConfig

    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert path.read_text().startswith("# "), f"{path.name} does not say what it shows"
        parser = make_parser("minigpt train", "")
        add_training_settings(parser)
        TrainConfig(**fields_of(parse(parser, ["--config", path.stem]), TrainConfig)).check()


def test_later_values_win(said, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {preset: llama, n_layer: 3, vocab_size: 99}\n")
    code, out, _ = said("plan", "--config", str(path), "--model.n_layer", "5", "--json", *SPARING)
    model = json.loads(out)["model"]
    assert code == 0
    assert (model["preset"], model["n_layer"], model["norm"]) == ("llama", 5, "rmsnorm")


def test_a_prompt_is_continued(trained: Path, said) -> None:
    arguments = ("sample", str(trained), "--prompt", "the cat", "--max_new_tokens", "12", "--seed", "5")
    code, out, _ = said(*arguments)
    assert code == 0
    assert out.startswith("the cat")
    assert said(*arguments)[1] == out


def test_json_carries_every_sample(trained: Path, said) -> None:
    prompts = ["123", "- a: b", "the"]  # texts that YAML would take for something else
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    _, out, _ = said(
        "sample", str(trained), *flags, "--num_return_sequences", "2", "--json", "--seed", "5", "--max_new_tokens", "4"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert all(len(row["ids"]) == 4 and row["finish_reason"] == "length" for row in rows)
    places = [(row["prompt_index"], row["sample_index"], row["seed"]) for row in rows]
    assert places == [(0, 0, 5), (0, 1, 5), (1, 0, 6), (1, 1, 6), (2, 0, 7), (2, 1, 7)]
    alone = json.loads(
        said("sample", str(trained), "--prompt", "the", "--json", "--seed", "7", "--max_new_tokens", "4")[1]
    )
    assert alone["ids"] == rows[4]["ids"]


def test_prompts_come_from_a_file_or_standard_input(
    trained: Path, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("sample", str(trained), "--max_new_tokens", "5", "--temperature", "0")
    expected = said(*common, "--prompt", "two rats")[1]
    (tmp_path / "prompt.txt").write_text("two rats")
    assert said(*common, "--prompt_file", str(tmp_path / "prompt.txt"))[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two rats")))
    assert said(*common, "--prompt_file", "-")[1] == expected
    assert said(*common, "--prompt_file", "-", "--prompt", "x")[0] == 2
    assert said(*common, "--prompt_file", str(tmp_path / "none.txt"))[0] == 2


def test_generation_config_gives_the_defaults(said, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = random_model(tiny_config("llama", vocab_size=257))
    save_checkpoint(
        folder, model, build_tokenizer(TokenizerConfig(kind="byte")), sampling={"max_new_tokens": 3, "do_sample": False}
    )
    row = json.loads(said("sample", str(folder), "--prompt", "a", "--json", "--ignore_eos", "true")[1])
    assert len(row["ids"]) == 3
    row = json.loads(
        said("sample", str(folder), "--prompt", "a", "--json", "--ignore_eos", "true", "--max_new_tokens", "5")[1]
    )
    assert len(row["ids"]) == 5


def test_eval_agrees_with_the_row_written_while_training(trained: Path, said, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    row = [row for row in rows if "val/loss" in row][-1]
    code, out, _ = said("eval", str(trained), "--json")
    assert code == 0
    assert json.loads(out)["loss"] == pytest.approx(row["val/loss"], rel=1e-6)
    assert json.loads(out)["tokens"] == row["val/tokens"]
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on a mat")
    code, out, _ = said(
        "eval", str(trained), "--data.source", str(other), "--data.folder", str(tmp_path / "d"), "--json"
    )
    assert code == 0
    assert json.loads(out)["bytes"] == 19  # every byte but the first is predicted


def test_eval_notices_that_its_text_has_changed(said, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    run = train(config)
    text = Path(config.data.source)
    text.write_text(text.read_text().upper())
    code, _, err = said("eval", str(run))
    assert code == 4
    assert "has changed since" in err
    assert said("eval", str(run), "--tokens", "-5")[0] == 2


def test_readme_names_only_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    for name in re.findall(r"`(tests|benchmarks)/(\w+\.py)`", readme):
        assert ROOT.joinpath(*name).is_file()
    tree = readme.partition("## The code")[2]
    for path in (ROOT / "minigpt").rglob("*/"):
        if path.name not in ("__pycache__", "_shipped") and any(path.glob("*.py")):
            assert f"{path.name}/" in tree, f"{path.name} is not in README's map"


def test_the_map_names_every_file() -> None:
    tree = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    for path in (ROOT / "minigpt").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert re.search(rf"\b{path.stem}\b", tree), f"{path.stem} is not in docs/map.md"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.stem)
def test_what_a_page_links_and_names_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert name.startswith("https://") or (page.parent / name).exists(), name
    for name in re.findall(r"--config (\w+)", page.read_text(encoding="utf-8")):
        assert name in ("FILE", "NAME") or any((ROOT / "configs").rglob(f"{name}.yaml")), name


def test_prepare_tells_what_it_made(said, tmp_path: Path) -> None:
    source = corpus_file(tmp_path)
    code, out, _ = said(
        "prepare", "--data.source", str(source), "--data.folder", str(tmp_path / "d"), "--tokenizer.kind", "char"
    )
    size = source.stat().st_size
    assert code == 0
    assert f"{int(size * 0.9):,} tokens (1.00 bytes per token)" in out


def test_info_of_a_run(trained: Path, said) -> None:
    figures = json.loads(said("info", str(trained), "--json")[1])
    assert figures["model"]["vocab_size"] == 257
    assert figures["parameters"] == sum(p.numel() for p in minigpt.load(trained).model.parameters())
    assert said("info", str(trained), "--model.n_layer", "9")[0] == 2


def test_the_latest_run_is_meant_where_none_is_named(
    trained: Path, said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(trained.parents[1])
    assert said("sample", "--prompt", "the", "--max_new_tokens", "2")[0] == 0
    monkeypatch.chdir(tmp_path)
    code, _, err = said("sample", "--prompt", "the")
    assert code == 2
    assert "runs/ holds none; train one first" in err


def test_a_run_goes_on_from_its_own_config(trained: Path, said) -> None:
    """Only the name is given: everything else is as it was."""
    code, out, err = said("train", "--runs_dir", str(trained.parent), "--run_name", "run", "--trainer.max_steps", "10")
    assert code == 0
    assert "resumes with trainer.max_steps 8 -> 10" in err
    assert "(step 10)" in out
