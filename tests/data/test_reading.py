import gzip
import json
import sys

import pytest
import zstandard

from minigpt.data import decoding, reading
from minigpt.data.config import DataConfig
from minigpt.data.decoding import ReadingLog
from minigpt.data.reading import read_documents, whole_lines
from minigpt.errors import DataError, MissingExtra

TEXT = "one line\n" + "a line without an end, é漢🙂 " * 20 + "\n\n\r\nlast\0"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 bytes, so that short texts are cut in every way."""
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(decoding, "SNIFFED", 16)


def documents(path, field="text", log=None) -> list[str]:
    out = [""]
    for text, ends in read_documents(path, DataConfig(field=field), log or ReadingLog()):
        out[-1] += text
        if ends:
            out.append("")
    assert out.pop() == ""
    return out


def test_a_file_read_in_pieces_is_the_file(tmp_path, small_blocks):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    log = ReadingLog()
    pieces = list(read_documents(path, DataConfig(), log))
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == TEXT
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert log.bytes == len(TEXT.encode())
    assert log.invalid == 0


@pytest.mark.parametrize("name", ["a.txt.gz", "a.gz", "a.txt.zst", "a.GZ"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, small_blocks, name):
    path, content = tmp_path / name, TEXT.encode()
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else zstandard.compress(content))
    assert documents(path) == [TEXT]


def test_several_zstandard_frames_are_one_text(tmp_path, small_blocks):
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(TEXT.encode()))
    assert documents(path) == ["one " + TEXT]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    content = bytes(range(256)) * 50
    compressed = gzip.compress(content) if suffix == "gz" else zstandard.compress(content)
    path.write_bytes(compressed[:-9])
    with pytest.raises(DataError, match=f"a.{suffix}"):
        documents(path)
    path.write_bytes(b"no such format")
    with pytest.raises(DataError, match=f"a.{suffix} cannot be read"):
        documents(path)


def test_zst_without_zstandard_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.zst"
    path.write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"a.zst needs the package 'zstandard'.*\[zstd\]"):
        documents(path)


def test_the_byte_order_mark_is_dropped_once(tmp_path, small_blocks):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbftext")
    assert documents(path) == ["\ufefftext"]
    path.write_bytes(b"\xef\xbb")
    assert documents(path) == ["\ufffd"]


@pytest.mark.parametrize(
    "content",
    [
        b"ok \xff\xfe \xe9t\xe9\n" * 9,
        b"\x80" * 200,
        b"\xf0\x9f\x98" * 70,
        ("\ufffd" * 50).encode() + b"\xff",
        b"\xe2\x82" * 99,
    ],
)
def test_invalid_bytes_become_replacement_characters_and_are_counted(tmp_path, small_blocks, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    log = ReadingLog()
    whole = content.decode("utf-8", "replace")
    assert documents(path, log=log) == [whole]
    assert log.invalid == whole.count("\ufffd") - content.count("\ufffd".encode())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("limit", [4, 7, 64, None])
def test_pieces_end_with_lines_or_between_characters(size, limit):
    content = ("é漢🙂" * 9 + "\nx\n\n" + "🙂" * 20).encode()
    pieces = list(whole_lines((content[i : i + size] for i in range(0, len(content), size)), limit))
    assert b"".join(pieces) == content
    for piece in pieces:
        piece.decode("utf-8")
    if limit is None:
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])
        assert b"\n" not in pieces[-1]


def test_each_line_of_jsonl_is_a_document(tmp_path, small_blocks):
    path = tmp_path / "a.jsonl.gz"
    texts = ["first\nwith a line", "", "long " * 50, "é\u2028"]
    lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes(gzip.compress(("\ufeff" + "\r\n".join(lines) + "\n\n  \n").encode()))
    assert documents(path, "body") == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3 is not JSON"),
        (b"[1]", "line 3 is list"),
        (b'{"body": 1}', "line 3 has no field 'text'; its fields are 'body'.*--data.field"),
        (b'{"text": 1}', "line 3: field 'text' is int"),
        (b'{"text": null}', "line 3: field 'text' is NoneType"),
        (b"[" * 100_000, "line 3 is not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        documents(path)


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    log = ReadingLog()
    assert documents(path, log=log) == ["a\ufffdb 🙂"]
    assert log.invalid == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        documents(tmp_path / "gone.txt")
