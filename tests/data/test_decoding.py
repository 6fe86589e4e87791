"""Bytes -> text by the byte order mark, against Python's own decoders, through every reader of a text."""

from __future__ import annotations

import codecs
import gzip
import io
import sys
from pathlib import Path

import pytest
import zstandard

from minigpt.data import decoding, reading
from minigpt.data.config import DataConfig
from minigpt.data.corpus import find_source
from minigpt.data.decoding import NotText, ReadingLog, as_utf8
from minigpt.data.reading import read_documents, read_text
from minigpt.errors import ConfigError

TEXT = "Plain, é 漢字 🙂\r\nand a \ufeff mark inside\rend\n" * 3
MARKED = {
    "utf-8": codecs.BOM_UTF8 + TEXT.encode("utf-8"),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32-le": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}
NO_TEXT = {
    "UTF-16 without a mark": "The cat sat".encode("utf-16-le"),
    "Cyrillic UTF-16 without a mark": "Кот сидел на ковре. ".encode("utf-16-le") * 9,
    "a program": b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"code" * 99,
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(1, 256)) * 30,
    "an archive": b"a.txt" + b"\0" * 95 + b"0000644\0" + b"text " * 99,
    "zeros behind a mark": codecs.BOM_UTF16_LE + b"\0" * 99,
}


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def whole(blocks: list[bytes], log: ReadingLog) -> str:
    return b"".join(as_utf8(blocks, "a file", log)).decode("utf-8")


def of_source(source: Path | str, log: ReadingLog | None = None, **more: str) -> list[str]:
    """The documents of a source."""
    texts = [""]
    for text, ends in find_source(DataConfig(source=str(source), **more)).documents(log or ReadingLog()):
        texts[-1] += text
        texts += [""] if ends else []
    assert texts.pop() == ""
    return texts


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("size", [1, 3, 64, 10**6])
def test_a_mark_says_how_to_decode_however_the_bytes_are_cut(encoding, size, monkeypatch):
    monkeypatch.setattr(decoding, "SNIFFED", 5)
    content, log = MARKED[encoding], ReadingLog()
    assert whole([content[i : i + size] for i in range(0, len(content), size)], log) == TEXT
    assert (log.invalid, log.notices()) == (0, [])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("size", [1, 3, 10**6])
def test_what_is_no_character_becomes_u_fffd_and_is_counted(encoding, size):
    # Halves of surrogate pairs in the wrong order, a genuine U+FFFD, and a last character that is cut.
    broken = "a\udc00b\ud83d\ufffd🙂".encode(encoding, "surrogatepass")[:-1]
    content, log = MARKED[encoding][: 4 if "32" in encoding else 2] + broken, ReadingLog()
    expected = broken.decode(encoding, "replace")
    assert whole([content[i : i + size] for i in range(0, len(content), size)], log) == expected
    assert log.invalid == expected.count("\ufffd") - 1
    assert log.invalid_in == "a file"


@pytest.mark.parametrize("encoding", MARKED)
def test_every_door_reads_a_marked_text_alike(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 64)
    monkeypatch.setattr(decoding, "SNIFFED", 16)
    content = MARKED[encoding]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(content)
    (folder / "b.txt.gz").write_bytes(gzip.compress(content))
    (folder / "c.txt.zst").write_bytes(zstandard.compress(content))
    for path in sorted(folder.iterdir()):
        assert of_source(path) == [TEXT]
        assert read_text("--prompt_file", str(path)) == TEXT
    assert of_source(folder) == of_source(folder / "*") == [TEXT] * 3
    pipe(monkeypatch, content)
    assert of_source("-", folder=str(tmp_path / "data")) == [TEXT]
    pipe(monkeypatch, content)
    assert read_text("--prompt_file", "-") == TEXT
    lines = "".join(f'{{"text": "{word}"}}\r\n' for word in ("é", "字"))
    (tmp_path / "d.jsonl").write_bytes(("\ufeff" + lines).encode(encoding))
    assert of_source(tmp_path / "d.jsonl") == ["é", "字"]


@pytest.mark.parametrize("content", NO_TEXT.values(), ids=NO_TEXT)
def test_what_is_no_text_is_refused_alone_and_left_out_among_others(content, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    (tmp_path / "z.txt").write_text("text")
    for name in ("a.txt", "a.txt.gz"):
        with pytest.raises(NotText, match=rf"{name} is not text: it starts with NUL bytes"):
            of_source(tmp_path / name)
        with pytest.raises(ConfigError, match=rf"^--text .*{name} is not text"):
            read_text("--text", str(tmp_path / name))
    for source in (tmp_path, tmp_path / "*"):
        log = ReadingLog()
        assert of_source(source, log) == ["text"]
        assert log.skipped == [str(tmp_path / "a.txt"), str(tmp_path / "a.txt.gz")]
        assert "skipped, not text" in log.notices()[0]
    pipe(monkeypatch, content)
    with pytest.raises(ConfigError, match=r"^--text standard input is not text"):
        read_text("--text", "-")


def test_a_nul_here_and_there_is_text_and_is_told(tmp_path):
    content = ("Zeile mit Umlaut: ü\n" * 20 + "\0\r").encode() * 3
    (tmp_path / "a.txt").write_bytes(content)
    for source in (tmp_path / "a.txt", tmp_path):
        log = ReadingLog()
        assert of_source(source, log) == [content.decode()]
        assert log.skipped == []
        assert log.notices() == [f"the text contains 3 NUL characters (U+0000), the first in {tmp_path / 'a.txt'}"]


def test_a_nul_far_from_the_beginning_is_told_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\n" * 4000 + b"\0" * 200)
    log = ReadingLog()
    of_source(tmp_path / "a.txt", log)
    assert log.nulls == 200


def test_latin_1_is_read_with_u_fffd_and_the_notice_says_what_to_do(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("sound")
    (tmp_path / "b.txt").write_bytes("déjà vu".encode("latin-1"))
    log = ReadingLog()
    assert of_source(tmp_path, log) == ["sound", "d\ufffdj\ufffd vu"]
    [line] = log.notices()
    assert line.startswith(f"2 invalid byte sequences were replaced by U+FFFD, the first in {tmp_path / 'b.txt'}; ")
    assert "iconv -f LATIN1 -t UTF-8" in line
    assert read_text("--text", str(tmp_path / "b.txt")) == "d\ufffdj\ufffd vu"
    assert capsys.readouterr().err == f"--text {tmp_path / 'b.txt'}: {line}\n"


@pytest.mark.parametrize("content", [b"a\rb\rc", b"a\r\nb\n\rc\n", b"", b"\r" * 300])
def test_line_ends_stay_as_they_are(content, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert of_source(path) == [content.decode()]
    assert read_text("--text", str(path)) == content.decode()
    pipe(monkeypatch, content)
    assert read_text("--text", "-") == content.decode()


def test_reading_a_marked_text_holds_one_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 1024)
    monkeypatch.setattr(decoding, "SNIFFED", 1024)
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF16_LE + ("x" * 50_000).encode("utf-16-le"))
    longest = max(len(piece.text) for piece in read_documents(path, DataConfig(), ReadingLog()))
    assert longest <= 2 * 1024


def test_closed_standard_input_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"standard input \(-\) is closed"):
        read_text("--prompt_file", "-")
    with pytest.raises(ConfigError, match=r"standard input \(-\) is closed"):
        of_source("-", folder=str(tmp_path))
