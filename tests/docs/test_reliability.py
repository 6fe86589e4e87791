"""The page on reliability cannot drift: each line of its table is one that the code prints, with that exit code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from minigpt import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
VALUE = "\0"


def lines_of_the_code() -> list[tuple[str, str]]:
    """(who says it, the text with a NUL for each value) of every error and notice in the package."""
    found = []
    for path in (ROOT / "minigpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            for said in (part for argument in node.args for part in ast.walk(argument)):
                if isinstance(said, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in said.values]
                    found.append((node.func.id, "".join(str(part) for part in parts)))
    return found


CODE = lines_of_the_code()
ROWS = [
    [cell.strip() for cell in row.strip().strip("|").split(" | ")]
    for row in PAGE.splitlines()
    if row.startswith("| ") and not row.startswith("| fault")
]


def speakers(line: str) -> set[str]:
    """Who says a line of the page: `...` stands for any values and words between."""
    pattern = ".*".join(re.escape(part) for part in line.split("..."))
    return {who for who, text in CODE if VALUE in text and re.fullmatch(pattern, text, re.DOTALL)}


@pytest.mark.parametrize("row", [row for row in ROWS if row[-1].startswith("`")], ids=lambda row: row[0])
def test_each_line_of_the_table_is_one_of_the_code(row: list[str]) -> None:
    _, _, code, line = row
    found = speakers(line.strip("`"))
    assert found, line
    if code[:1].isdigit() and "," not in code:
        assert int(re.findall(r"\d+", code)[0]) in {
            getattr(errors, who).exit_code for who in found if who in dir(errors)
        }


def test_the_table_is_read_whole() -> None:
    assert len(ROWS) > 25
    assert all(len(row) == 4 or row[-1] == "" or len(row) == 3 for row in ROWS)
    assert not speakers("...: is full of water; ...")


@pytest.mark.parametrize("name", re.findall(r"`(tests/[\w/]+\.py|benchmarks/\w+\.py)", PAGE))
def test_files_that_the_page_names_exist(name: str) -> None:
    assert (ROOT / name).is_file()
