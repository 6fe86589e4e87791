import gzip
import io
import os
import re
import types

import pytest

from minigpt.data.config import DataConfig
from minigpt.data.corpus import find_source
from minigpt.data.decoding import ReadingLog
from minigpt.data.prepare import find_prepared, prepare
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, DataError
from minigpt.tokenizer.config import TokenizerConfig

BYTE = TokenizerConfig(kind="byte")


def documents(source, log=None) -> list[str]:
    out = [""]
    for text, ends in source.documents(log or ReadingLog()):
        out[-1] += text
        if ends:
            out.append("")
    return out[:-1]


def find(source, **more):
    return find_source(DataConfig(source=str(source), **more))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my text.txt", "my-text"),
        ("a.b.jsonl.gz", "a.b"),
        ("plain", "plain"),
        (".hidden", "hidden"),
        ("日本.txt", "日本"),
    ],
)
def test_a_file_names_its_corpus(tmp_path, path, name):
    (tmp_path / path).write_bytes(gzip.compress(b'{"text": "x"}') if path.endswith("gz") else b"x")
    source = find(tmp_path / path)
    assert source.name == name
    assert documents(source) == ["x"]


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path, monkeypatch):
    folder = tmp_path / "books"
    for path, content in {
        "b.txt": b"B",
        "a/z.txt": b"AZ",
        "a/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "c.md.gz": gzip.compress(b"C"),
        "image.png": b"\x89PNG\0",
        ".git/config": b"hidden",
        ".hidden": b"hidden",
        "data/books/byte-1/manifest.json": b"{}",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    log = ReadingLog()
    source = find(folder, folder=str(folder / "data"))
    assert source.name == "books"
    assert documents(source, log) == ["one", "two", "AZ", "B", "C"]
    assert [os.path.basename(path) for path in log.skipped] == ["image.png"]
    monkeypatch.chdir(folder)
    assert find(".").name == "books"
    assert documents(find(".")) == ["one", "two", "AZ", "B", "C"]


def test_a_glob_names_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b1.txt", "a1.txt", "c.md"):
        (tmp_path / name).write_text(name)
    source = find("*1.txt")
    assert documents(source) == ["a1.txt", "b1.txt"]
    assert source.name == "1.txt"
    with pytest.raises(DataError, match=r"'\*\.rst' matches no file"):
        find("*.rst")


def test_a_name_in_the_catalogue_comes_before_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydocs").write_text("mine")
    assert len(documents(find("pydocs"))) > 50
    assert documents(find("./pydocs")) == ["mine"]


def test_an_unknown_source_names_the_nearest_and_all(tmp_path):
    with pytest.raises(ConfigError, match=r"'tinyshakespear' is neither.*did you mean 'tinyshakespeare'\?.*pydocs"):
        find("tinyshakespear")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder without text files"):
        find(tmp_path / "empty")


def test_the_root_of_the_file_system_gives_no_name():
    with pytest.raises(ConfigError, match="has no file name for the corpus folder"):
        find("/")


def test_standard_input_can_be_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"piped text")))
    source = find("-", folder=str(tmp_path))
    assert documents(source) == documents(source) == ["piped text"]
    assert source.name == "stdin"
    assert len(list((tmp_path / "stdin" / "source").iterdir())) == 1


def test_empty_standard_input_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(DataError, match="standard input is empty"):
        find("-", folder=str(tmp_path))
    assert list((tmp_path / "stdin" / "source").iterdir()) == []


def test_a_fingerprint_changes_with_size_time_and_files_but_not_with_reading(tmp_path):
    path = tmp_path / "books" / "a.txt"
    path.parent.mkdir()
    path.write_text("one")
    seen = []

    def fingerprints() -> tuple:
        found = find(path).fingerprint, find(path.parent).fingerprint
        seen.append(found)
        return found

    first = fingerprints()
    documents(find(path))
    assert fingerprints() == first
    os.utime(path, ns=(1, 1))
    assert fingerprints()[0] != first[0]
    path.write_text("longer")
    os.utime(path, ns=(1, 1))
    fingerprints()
    (path.parent / "b.txt").write_text("another")
    fingerprints()
    assert len({str(folder) for _, folder in seen}) == 4


@pytest.mark.parametrize("name", ["📚.txt", "...!.txt.gz", "\udcff.txt"])
def test_a_name_without_a_letter_gives_a_corpus_a_name_of_its_own(tmp_path, name):
    names = set()
    for stem in ("", "🐱"):
        try:
            (tmp_path / (stem + name)).write_bytes(gzip.compress(b"x") if name.endswith("gz") else b"x")
        except OSError:
            pytest.skip("this file system takes no such name")
        source = find(tmp_path / (stem + name))
        assert documents(source) == ["x"]
        assert re.fullmatch("text-[0-9a-f]{8}", source.name)
        assert find(tmp_path / (stem + name)).name == source.name
        names.add(source.name)
    assert len(names) == 2


def test_names_that_are_no_utf_8_are_names(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/d\xe9"
    os.mkdir(folder)
    try:
        for name in (b"caf\xe9.txt", b"caf\xe8.txt"):
            with open(folder + b"/" + name, "wb") as file:
                file.write(name[3:4] + b"text " * 99)
    except OSError:
        pytest.skip("this file system takes no such name")
    made = set()
    for source in (folder, folder + b"/caf\xe9.txt", folder + b"/caf?.txt"):
        data = DataConfig(source=os.fsdecode(source), folder=str(tmp_path / "data"))
        corpus = prepare(data, BYTE)
        assert "invalid byte sequences" in (said := capsys.readouterr().err) or "2 invalid sequences" in said
        assert find_prepared(data, BYTE).folder == corpus.folder == open_corpus(corpus.folder).folder
        assert open_corpus(corpus.folder).manifest["source"]["name"] == os.fsdecode(source)
        made.add(corpus.manifest["request"])
    assert len(made) == 3


def test_files_that_differ_in_one_strange_byte_have_different_fingerprints(tmp_path):
    found = []
    for byte in (b"\xe8", b"\xe9"):
        folder = tmp_path / str(byte[0])
        folder.mkdir()
        path = os.fsencode(folder) + b"/" + byte + b".txt"
        try:
            with open(path, "wb") as file:
                file.write(b"x")
        except OSError:
            pytest.skip("this file system takes no such name")
        os.utime(path, ns=(1, 1))
        found.append(find(folder).fingerprint["listing_sha256"])
    assert found[0] != found[1]


def test_the_empty_file_among_others_is_told(tmp_path, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("")
    (tmp_path / "books" / "b.txt").write_text("some text")
    prepare(DataConfig(source=str(tmp_path / "books"), folder=str(tmp_path / "data")), BYTE)
    assert "books: dropped 1 empty of 2 documents" in capsys.readouterr().err


def test_a_folder_in_which_nothing_is_text_says_what_there_was(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.bin").write_bytes(b"\0" * 9)
    with pytest.raises(DataError, match=r"no text left \(no documents; skipped, not text: .*a\.bin\)"):
        prepare(DataConfig(source=str(tmp_path / "books"), folder=str(tmp_path / "data")), BYTE)
