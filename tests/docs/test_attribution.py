"""Every command and every line of Python on docs/study/attribution.md, on a run that is trained in a moment."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from minigpt.cli.main import main
from training_runs import tiny_run, train

PAGE = Path(__file__).parents[2] / "docs/study/attribution.md"
SMALL = {  # what the page leaves at its default, and what is enough here
    "train_tuned_lens()": "train_tuned_lens(steps=2, tokens=64)",
    "fit_jacobian_lens()": "fit_jacobian_lens(tokens=64)",
    "--kind tuned --train": "--kind tuned --train --steps 2 --tokens 64",
    "--kind jacobian --train": "--kind jacobian --train --tokens 64",
}


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"preset": "modern", "block_size": 32, "n_layer": 4, "n_head": 2, "n_embd": 32}
    train(tiny_run(tmp_path, "plays", trainer__max_steps=2, **{f"model__{name}": size for name, size in sizes.items()}))
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    for as_told, as_run in SMALL.items():
        assert as_told in text
        text = text.replace(as_told, as_run)
    names: dict[str, Any] = {}
    told = []
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            command = shlex.split(line, comments=True)[1:]
            if command[0] != "train":
                capsys.readouterr()
                assert main(command) == 0, line
                told.append(capsys.readouterr().out)
    assert len(told) == 5 and all(told)
    assert {path.name for path in (tmp_path / "runs/plays").glob("*_lens.*")} == {
        "tuned_lens.safetensors",
        "jacobian_lens.safetensors",
    }
    # The page's own sentences: the notes and labels that it names.
    attributed = names["study"].attribute_logit(names["text"], "g")
    assert {"sum", "logit", "remainder", "scale", "cap", "after the cap"} <= set(attributed.notes)
    assert names["study"].saliency(names["text"], "g").notes.keys() >= {"value", "baseline", "steps", "remainder"}
