"""Every command and every line of Python on docs/study/features.md, on a run that is trained in a moment."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minigpt.cli.main import main
from minigpt.internals.features import autoencoder_training
from minigpt.internals.features.autoencoder_config import AutoencoderConfig
from minigpt.model.config import GPTConfig
from training_runs import tiny_run, train

PAGE = Path(__file__).parents[2] / "docs/study/features.md"
SMALL = {"steps": 4, "batch": 64}


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(tmp_path, "shakespeare", trainer__max_steps=2)
    train(replace(config, model=GPTConfig(preset="modern", block_size=64, n_layer=4, n_head=4, n_embd=32)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(autoencoder_training, "AutoencoderConfig", functools.partial(AutoencoderConfig, **SMALL))
    text = PAGE.read_text(encoding="utf-8")
    # The run's validation split has a few hundred bytes only, and its autoencoders learn for a few steps.
    text = text.replace("np.arange(400) * 270", "np.arange(20) * 15").replace("k=16)", "k=16, steps=4, batch=64)")
    names: dict[str, Any] = {}
    run = 0
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(block, names)
            run += 1
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)[1:]
            if command[0] == "train":
                continue
            if command[0] == "sae" and "train" in command:
                command += ["--steps", "4", "--batch", "64"]
            capsys.readouterr()
            assert main(command) == 0, line
            assert capsys.readouterr().out, line
            run += 1
    assert run == 10
    assert (tmp_path / "qu.json").is_file() and (tmp_path / "capitals.safetensors").is_file()
    assert (tmp_path / "runs/shakespeare/autoencoders/1.resid_post-topk/cfg.json").is_file()
