"""docs/extending.md: its plug-ins are the tested files, its scripts run, and a part is added by one file and a row."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.plugins import TABLES
from plugged import FILES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = {found[1]: block for block in BLOCKS if (found := re.match(r"# (\w+)\.py\n", block))}


def body(text: str) -> list[str]:
    """The lines of code: without comments at the start, docstring of the module and blank lines."""
    text = re.sub(r'^"""(?s:.*?)"""\n', "", re.sub(r"^# \w+\.py\n", "", text))
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_page_shows_the_files_that_are_tested(path: Path) -> None:
    assert body(SHOWN[path.stem]) == body(path.read_text(encoding="utf-8"))
    assert len(body(SHOWN[path.stem])) <= 15


def test_every_kind_is_on_the_page_with_an_example() -> None:
    assert set(re.findall(r"^\| \[`(\w+)`\]\(#", PAGE, re.MULTILINE)) == set(TABLES)
    registered = set(re.findall(r'@minigpt\.register\("(\w+)"', "".join(SHOWN.values())))
    assert registered == set(TABLES)


def test_the_scripts_run_as_written(tmp_path: Path) -> None:
    scripts = [block for block in BLOCKS if not re.match(r"# \w+\.py\n|@minigpt", block)]
    assert len(scripts) == 3
    small = '"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16'
    given = f'{{"model": {{{small}}}, "batch": {{"tokens": 128}}, "sample": {{"max_new_tokens": 4}}, "trainer"'
    program = "\n".join(scripts).replace('{"trainer"', given)
    program = program.replace("minigpt.DataConfig()", 'minigpt.DataConfig("t.txt")')
    (tmp_path / "t.txt").write_text("the cat sat on the mat " * 400)
    (tmp_path / "program.py").write_text(
        program + "\nassert minigpt.load('own/step-00000020').model and run.metrics['step'][-1] == 20\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "loss.svg").is_file()


def test_a_part_in_the_package_is_one_file_and_one_row(tmp_path: Path) -> None:
    """The plug-in's class in a file of the package, and its row: it trains, is listed and is studied."""
    shutil.copytree(ROOT / "minigpt", tmp_path / "minigpt", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "corpora.yaml", tmp_path / "data")
    lines = [line for line in body(SHOWN["dyt"]) if "minigpt" not in line]
    (tmp_path / "minigpt/model/dyt.py").write_text("\n".join(lines) + "\n")
    config = tmp_path / "minigpt/model/config.py"
    row = '        "dyt": Row("minigpt.model.dyt:DynTanh", "weight * tanh(alpha x) + bias"),\n'
    text = config.read_text(encoding="utf-8")
    place = text.index('        "rmsnorm": Row(')
    config.write_text(text[:place] + row + text[place:], encoding="utf-8")
    program = """
import torch, minigpt
from minigpt.cli.main import main
small = "--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --batch.tokens 128 --eval.every 0"
words = f"train --data.source t.txt --tokenizer.kind byte --run_name a --trainer.max_steps 2 {small} --model.norm dyt"
assert main(words.split()) == 0
run = minigpt.load("runs/a")
assert type(run.model.trunk.norm).__name__ == "DynTanh"
ids = torch.tensor([run.tokenizer.encode("the cat")])
torch.testing.assert_close(minigpt.Study(run).logits("the cat"), run.model(ids))
"""
    (tmp_path / "t.txt").write_text("the cat sat on the mat " * 100)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
