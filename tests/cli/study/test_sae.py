"""The verb for sparse autoencoders: train, show, eval, and what it says of bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.internals.features.autoencoder_training import Learner
from minigpt.tokenizer.plain import ByteTokenizer, CharTokenizer
from toys import random_ids, random_model, tiny_config

TOKENIZER = CharTokenizer([chr(48 + i) for i in range(61)])
SMALL = ["--k", "4", "--d_sae", "64", "--steps", "12", "--batch", "96"]


@pytest.fixture
def run(tmp_path: Path) -> str:
    save_checkpoint(tmp_path / "run/checkpoints/step-00000007", random_model(tiny_config("modern")), TOKENIZER)
    (tmp_path / "text").write_text(TOKENIZER.decode(random_ids(1, 600)[0].tolist()), encoding="utf-8")
    return str(tmp_path / "run")


def test_an_autoencoder_is_trained_judged_and_shown(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(Path(run).parent / "text"), "--json"]
    assert main(["sae", run, "train", "--at", "resid_post", "--layer", "1", *SMALL, *text]) == 0
    told = json.loads(capsys.readouterr().out)
    folder = Path(run) / "autoencoders/1.resid_post-topk"
    assert told["folder"] == str(folder) and (folder / "cfg.json").is_file()
    assert told["axes"][0]["labels"][1] == "explained variance"
    assert main(["sae", run, "eval", *text]) == 0
    figures, density = json.loads(capsys.readouterr().out)
    assert figures["values"] == pytest.approx(told["values"])
    assert len(density["values"]) == 64 and sum(density["values"]) == pytest.approx(figures["values"][0])
    assert main(["sae", run, "show", "--feature", "9", "--contexts", "2", *text]) == 0
    [feature] = json.loads(capsys.readouterr().out)
    assert feature["feature"] == 9 and len(feature["raises"]) == 8
    assert main(["sae", run, "show", "--contexts", "2", *text[:2]]) == 0
    assert capsys.readouterr().out.count("  raises ") == 6


def test_a_transcoder_is_named_after_both_its_ends(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(Path(run).parent / "text")]
    ends = ["--at", "mlp_in", "--target", "mlp_out", "--layer", "0", "--kind", "jumprelu"]
    assert main(["sae", run, "train", *ends, *SMALL, *text]) == 0
    out = capsys.readouterr().out
    assert "jumprelu transcoder at blocks.0.hook_mlp_out" in out
    assert (Path(run) / "autoencoders/0.mlp_in-to-0.mlp_out-jumprelu/sae_weights.safetensors").is_file()


def test_one_that_is_stopped_is_kept(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Learner.step

    def step(self: Learner, *rows: object) -> tuple[float, float]:
        if self.done == 3:
            raise KeyboardInterrupt
        return whole(self, *rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", step)
    text = ["--text", str(Path(run).parent / "text")]
    assert main(["sae", run, "train", "--layer", "0", "--autoencoder", "mine", *SMALL, *text]) == 130
    assert "stopped at step 3 of 12; saved in" in capsys.readouterr().err
    assert (Path(run) / "autoencoders/mine/cfg.json").is_file()


def test_bad_input_is_told_in_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, told in (
        ([run], 2, "expected minigpt sae RUN train, show or eval"),
        ([run, "trian"], 2, "expected minigpt sae RUN train, show or eval"),
        ([run, "eval"], 2, "holds no autoencoder"),
        ([run, "show", "--autoencoder", "x"], 2, "there is no such"),
        ([run, "train", "--layer", "0"], 2, "has no corpus; give a text"),
        ([run, "train", "--text", "nowhere"], 2, "--text nowhere: cannot be read as text"),
        ([run, "train", "--k", "0"], 2, "is not a whole number from 1"),
        ([run, "train", "--kind", "relu"], 2, "Expected one of"),
        ([run, "train", "--layer", "9"], 2, "layers are 0 .. 1"),
        ([run, "train"], 2, "add --layer, from 0 to 1"),
        ([run, "eval", "--tokens", "0"], 2, "expected 1 or more"),
    ):
        assert main(["sae", *arguments]) == code, arguments
        captured = capsys.readouterr()
        assert told in captured.err and captured.err.count("\n") == 1, captured.err
        assert captured.out == ""


def test_the_line_of_the_readme_and_the_other_order_of_its_words_train(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "study.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith("minigpt sae ")]
    _, *words = shlex.split(line.replace("runs/mine", run), comments=True)
    text = ["--text", str(Path(run).parent / "text")]
    assert main([*words, *SMALL, *text]) == 0
    assert main(["sae", "eval", run, *text]) == 0
    assert "explained variance" in capsys.readouterr().out
    assert main(["sae", run]) == 2
    assert "no action" in capsys.readouterr().err


def test_an_autoencoder_says_how_much_text_is_sensible(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save_checkpoint(
        run / "checkpoints/step-00000007", random_model(tiny_config("gpt2", vocab_size=257)), ByteTokenizer()
    )
    (tmp_path / "enough").write_text("the cat sat on the mat. " * 20)  # 480 bytes
    (tmp_path / "few").write_text("cat")
    small = ["sae", str(run), "train", "--layer", "1", "--k", "2", "--d_sae", "8", "--steps", "2", "--batch", "16"]
    assert main([*small, "--text", str(tmp_path / "enough")]) == 0
    told = capsys.readouterr().err
    assert "480 tokens for 8 features is little" in told and "use at least 800 tokens" in told
    assert "holds an autoencoder" not in told
    kept = (run / "autoencoders/1.resid_post-topk/sae_weights.safetensors").read_bytes()
    assert main([*small, "--text", str(tmp_path / "few")]) == 4
    assert "3 tokens for 8 features, fewer than one per feature; give a text of 800 tokens" in capsys.readouterr().err
    assert (run / "autoencoders/1.resid_post-topk/sae_weights.safetensors").read_bytes() == kept
    (tmp_path / "plenty").write_text("the cat sat on the mat. " * 40)
    assert main([*small, "--text", str(tmp_path / "plenty")]) == 0
    told = capsys.readouterr().err
    assert "sensible" not in told and "1.resid_post-topk: holds an autoencoder, which this one is to replace" in told
    assert json.loads((run / "autoencoders/1.resid_post-topk/cfg.json").read_text())["d_sae"] == 8
