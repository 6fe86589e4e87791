import hashlib
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minigpt.data import catalogue as catalogue_module
from minigpt.data.catalogue import catalogue, download, python_topics, repeated_blocks
from minigpt.data.config import DataConfig
from minigpt.data.corpus import find_source
from minigpt.data.decoding import ReadingLog
from minigpt.errors import ConfigError, DataError

TEXT = b"A corpus from a server.\n" * 5000


@pytest.fixture
def server():
    """Serves the bytes of `server.files` by path; a path that is not there is 404, one with None never answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.files.get(self.path, b"")
            if content is None:
                self.server.stalled.wait(10)
                return
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content) + self.server.missing))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.missing, server.stalled = {}, 0, threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


def entry_of(url: str, content: bytes = TEXT, **more) -> dict:
    return {"kind": "file", "url": url, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **more}


def list_corpus(monkeypatch, entry: dict) -> None:
    monkeypatch.setattr("minigpt.data.corpus.catalogue", lambda: {"tiny": entry})


def text_of(source) -> str:
    return "".join(text for text, _ in source.documents(ReadingLog()))


def test_every_entry_of_the_catalogue_is_complete():
    for name, entry in catalogue().items():
        assert entry["licence"], name
        assert entry["description"], name
        if entry["kind"] == "file":
            assert entry["url"].startswith("https://"), name
            assert len(bytes.fromhex(entry["sha256"])) == 32, name
            assert entry["bytes"] > 0, name
        elif entry["kind"] == "supplied":
            assert entry["url"].startswith("https://"), name
        else:
            assert entry["kind"] in ("pydocs", "repeats"), name


def test_repeated_blocks_are_random_blocks_that_come_again_and_again():
    documents = [text for text, ends in repeated_blocks(300, 192, 8, 48, 0) if ends]
    assert len(documents) == 300 and {len(text) for text in documents} == {192}
    periods = []
    for text in documents:
        period = next(n for n in range(1, 193) if text.startswith(text[n:]))
        assert text == (text[:period] * 24)[:192]
        periods.append(period)
    assert set(periods) == set(range(8, 49))
    counts = Counter("".join(documents))
    assert len(counts) == 64 and max(counts.values()) < 2 * min(counts.values())
    assert documents != [text for text, _ in repeated_blocks(300, 192, 8, 48, 1)]


def test_the_repeats_corpus_is_made_without_a_download_and_takes_no_file(tmp_path):
    source = find_source(DataConfig(source="repeats", folder=str(tmp_path)))
    made = catalogue()["repeats"]["made"]
    assert len(text_of(source)) == made["documents"] * made["length"]
    assert text_of(source) == text_of(source)
    assert source.fingerprint == {"name": "repeats", **made}
    with pytest.raises(ConfigError, match="'repeats', which is not downloaded"):
        find_source(DataConfig(source="repeats", file="x.txt"))


def test_python_topics_are_documents_in_order_of_their_names():
    from pydoc_data.topics import topics

    assert python_topics() == [text for _, text in sorted(topics.items())]


def test_a_python_without_its_topics_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"'pydocs' needs the module pydoc_data.*--data.source FILE"):
        find_source(DataConfig())


def test_a_named_corpus_is_downloaded_once_and_checked(server, monkeypatch, tmp_path):
    server.files["/tiny.txt"] = TEXT
    list_corpus(monkeypatch, entry_of(f"{server.address}/tiny.txt"))
    config = DataConfig(source="tiny", folder=str(tmp_path))
    source = find_source(config)
    source.settle(False)
    assert text_of(source) == TEXT.decode()
    assert [path.name for path in (tmp_path / "tiny" / "source").iterdir()] == ["tiny.txt"]
    server.files.clear()
    find_source(config).settle(False)


def test_a_damaged_earlier_download_is_fetched_anew(server, monkeypatch, tmp_path):
    server.files["/tiny.txt"] = TEXT
    list_corpus(monkeypatch, entry_of(f"{server.address}/tiny.txt"))
    path = tmp_path / "tiny" / "source" / "tiny.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT[:-1])
    find_source(DataConfig(source="tiny", folder=str(tmp_path))).settle(False)
    assert path.read_bytes() == TEXT


def test_a_zipped_corpus_is_unpacked(server, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", TEXT)
    server.files["/a.zip"] = (tmp_path / "a.zip").read_bytes()
    list_corpus(monkeypatch, entry_of(f"{server.address}/a.zip", member="inside"))
    source = find_source(DataConfig(source="tiny", folder=str(tmp_path)))
    source.settle(False)
    assert text_of(source) == TEXT.decode()
    assert [path.name for path in (tmp_path / "tiny" / "source").iterdir()] == ["inside"]


@pytest.mark.parametrize("content", [TEXT, b"PK but no archive"])
def test_an_archive_without_the_text_is_refused(server, tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("other", TEXT)
    server.files["/a.zip"] = (tmp_path / "a.zip").read_bytes() if content is TEXT else content
    with pytest.raises(DataError, match=r"not a .zip with a valid 'inside'.*--data.file PATH"):
        download("tiny", entry_of(f"{server.address}/a.zip", member="inside"), tmp_path / "inside", show=False)


@pytest.mark.parametrize(
    ("served", "missing", "message"),
    [
        (
            TEXT[:-1] + b"!",
            0,
            r"is not the corpus 'tiny': it has 120000 bytes .* expected 120000 bytes .*--data.file PATH",
        ),
        (TEXT + TEXT + TEXT, 0, "is not the corpus 'tiny'"),
        (b"", 0, r"could not be downloaded from http.*404.*--data.file PATH"),
        (TEXT[:1000], 119_000, "tiny"),  # the connection closes early
    ],
)
def test_a_download_that_is_not_the_corpus_leaves_nothing(server, tmp_path, served, missing, message):
    server.files["/tiny.txt"], server.missing = served, missing
    with pytest.raises(DataError, match=message):
        download("tiny", entry_of(f"{server.address}/tiny.txt"), tmp_path / "deep" / "tiny.txt", show=False)
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_server_that_never_answers_is_given_up(server, monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue_module, "TIMEOUT", 0.05)
    server.files["/tiny.txt"] = None
    with pytest.raises(DataError, match=r"could not be downloaded.*timed out"):
        download("tiny", entry_of(f"{server.address}/tiny.txt"), tmp_path / "tiny.txt", show=False)


def test_a_file_address_is_a_download_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    entry = entry_of((tmp_path / "a.txt").as_uri())
    download("tiny", entry, tmp_path / "b.txt", show=False)
    assert (tmp_path / "b.txt").read_bytes() == TEXT


def test_a_given_file_replaces_the_download_and_is_checked(monkeypatch, tmp_path):
    list_corpus(monkeypatch, entry_of("http://127.0.0.1:9/unreachable.txt"))
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT)
    config = DataConfig(source="tiny", file=str(path), folder=str(tmp_path / "data"))
    source = find_source(config)
    source.settle(False)
    assert text_of(source) == TEXT.decode()
    path.write_bytes(TEXT[1:])
    with pytest.raises(DataError, match=r"data.file '.*mine.txt' is not the corpus 'tiny': it has 119999 bytes"):
        find_source(config).settle(False)
    path.unlink()
    with pytest.raises(DataError, match=r"data.file '.*mine.txt' cannot be read"):
        find_source(config).settle(False)


def test_a_given_file_needs_a_named_corpus(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT)
    for source in ("pydocs", str(path)):
        with pytest.raises(ConfigError, match=r"data.file"):
            find_source(DataConfig(source=source, file=str(path)))


def test_a_name_in_the_catalogue_cannot_lead_out_of_the_folder(monkeypatch):
    monkeypatch.setattr("minigpt.data.corpus.catalogue", lambda: {"../evil": entry_of("https://example.invalid/a")})
    with pytest.raises(ConfigError, match=r"'\.\./evil' is not a valid folder name"):
        find_source(DataConfig(source="../evil"))


def test_the_catalogue_is_found_in_an_installed_package(monkeypatch, tmp_path):
    shipped = tmp_path / "minigpt" / "_shipped" / "data"
    shipped.mkdir(parents=True)
    (shipped / "corpora.yaml").write_text("mine: {kind: pydocs}\n")
    monkeypatch.setattr(catalogue_module, "__file__", str(tmp_path / "minigpt" / "data" / "catalogue.py"))
    assert catalogue() == {"mine": {"kind": "pydocs"}}
    (shipped / "corpora.yaml").unlink()
    with pytest.raises(DataError, match=r"corpora.yaml"):
        catalogue()
    assert not Path(catalogue_module.__file__).exists()
