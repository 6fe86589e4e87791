"""Which files a folder or a pattern names, against glob and os.walk, and what is told of the rest."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

from minigpt.data.config import DataConfig
from minigpt.data.corpus import find_source
from minigpt.data.decoding import ReadingLog
from minigpt.data.listing import list_folder, list_pattern
from minigpt.errors import DataError

FILES = [
    "a.txt",
    "b.md",
    "one/a.txt",
    "one/deep/c.txt",
    "one/deep/d.md",
    "two/a.txt",
    ".hidden",
    ".git/x.txt",
    "[x].txt",
]
PATTERNS = ["*", "*.txt", "**", "**/*.txt", "*/*.txt", "one/**/*.md", "**/deep/*", "**/a.txt", "t?o/**", "[ab].*",
            "one/../*/a.txt", "**/**/c.txt", "nowhere/*", "**/o*/**/*.md", "[[]x].txt"]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_pattern_names_what_glob_names(tree: Path, pattern: str, absolute: bool) -> None:
    pattern = f"{tree}/{pattern}" if absolute else pattern
    expected = {Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}
    assert list_pattern(pattern).files == sorted(expected)


def test_a_folder_holds_what_walking_finds(tree: Path) -> None:
    walked = [Path(parent) / name for parent, _, names in os.walk(tree) for name in names]
    visible = [path for path in walked if not any(part.startswith(".") for part in path.relative_to(tree).parts)]
    assert list_folder(tree, tree / "data").files == sorted(visible)
    assert list_folder(tree, tree / "one").files == sorted(path for path in visible if tree / "one" not in path.parents)


def test_links_to_folders_do_not_lead_round_in_a_circle_and_are_named(tree: Path) -> None:
    (tree / "loop").symlink_to(tree)
    (tree / "one" / "again").symlink_to(tree)  # two of them: 2 ** 40 paths before the system gives up
    (tree / "itself").symlink_to("itself")
    (tree / "gone.txt").symlink_to("nowhere.txt")
    (tree / "file.txt").symlink_to("a.txt")
    os.mkfifo(tree / "pipe")
    for found, prefix in ((list_folder(tree, tree / "data"), tree), (list_pattern("**"), Path())):
        assert prefix / "file.txt" in found.files
        assert len(found.files) == len(FILES) - 2 + 1
        assert found.left_out == [
            f"{prefix / 'gone.txt'} (a broken link)",
            f"{prefix / 'itself'} (a broken link)",
            f"{prefix / 'loop'} (a link to a folder)",
            f"{prefix / 'one' / 'again'} (a link to a folder)",
            f"{prefix / 'pipe'} (not a file)",
        ]
    assert Path("loop/a.txt") in list_pattern("*/a.txt").files  # a link that is one step of the way


def test_what_is_left_out_reaches_the_notice(tree: Path) -> None:
    (tree / "gone.txt").symlink_to("nowhere.txt")
    log = ReadingLog()
    list(find_source(DataConfig(source=str(tree))).documents(log))
    assert log.notices() == [f"skipped, not text: {tree / 'gone.txt'} (a broken link)"]
    (tree / "empty").mkdir()
    (tree / "empty" / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(DataError, match=r"without text files \(skipped: .*gone\.txt \(a broken link\)\)"):
        find_source(DataConfig(source=str(tree / "empty")))


@pytest.mark.parametrize("source", [".", "**/*.txt", "*/deep/*"])
def test_a_folder_that_cannot_be_read_is_named(tree: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir

    def forbidden(folder: Path) -> list[str]:
        if Path(folder).name == "deep":
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(DataError, match=r"one/deep cannot be read \(Permission denied\)"):
        find_source(DataConfig(source=source))


def test_a_file_that_vanishes_after_the_listing_is_named(tree: Path) -> None:
    source = find_source(DataConfig(source=str(tree)))
    (tree / "b.md").unlink()
    with pytest.raises(DataError, match=r"b\.md cannot be read"):
        list(source.documents(ReadingLog()))


def test_a_source_that_is_there_but_no_file_says_so(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(DataError, match="'pipe' is not a regular file; pipe it in"):
        find_source(DataConfig(source="pipe"))
