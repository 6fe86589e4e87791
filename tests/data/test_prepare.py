import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minigpt.data import prepare as preparing
from minigpt.data.batches import Batches
from minigpt.data.catalogue import python_topics
from minigpt.data.config import CleanConfig, DataConfig
from minigpt.data.encode import PIECE, ShardWriter
from minigpt.data.prepare import prepare
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, DataError, DiskError
from minigpt.tokenizer.config import TokenizerConfig

BYTE, CHAR = TokenizerConfig(kind="byte"), TokenizerConfig(kind="char")
TEXT = "".join(f"{number} lines, é\n" for number in range(300))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return DataConfig(source=str(tmp_path / "book.txt"), folder=str(tmp_path / "data"))


def tokens_of(stream) -> np.ndarray:
    return stream.read(np.array([0]), len(stream))[0]


def snapshot(folder) -> dict[str, tuple[int, int]]:
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def test_one_text_becomes_the_ids_of_its_two_parts(config):
    corpus = prepare(config, BYTE, show=False)
    border = int(len(TEXT) * 0.9)
    assert tokens_of(corpus.train).tolist() == list(TEXT[:border].encode())
    assert tokens_of(corpus.val).tolist() == list(TEXT[border:].encode())
    assert corpus.folder.parent == Path(config.folder) / "book"
    assert corpus.folder.name.startswith("byte-")
    assert corpus.counts["val"] == {
        "tokens": len(TEXT[border:].encode()),
        "bytes": len(TEXT[border:].encode()),
        "characters": len(TEXT) - border,
        "documents": 1,
    }
    corpus.verify()


def test_characters_are_numbered_over_the_whole_text_as_nanogpt_does(config):
    corpus = prepare(config, CHAR, show=False)
    numbers = {character: number for number, character in enumerate(sorted(set(TEXT)))}
    both = [*tokens_of(corpus.train), *tokens_of(corpus.val)]
    assert both == [numbers[character] for character in TEXT]
    assert corpus.tokenizer.decode(both) == TEXT


def test_merges_are_learned_from_the_training_text_only(config):
    text = "the training text " * 2000 + "zq" * 800  # the held-out tenth, 3760 characters, has every z
    Path(config.source).write_text(text)
    corpus = prepare(config, TokenizerConfig(kind="bpe", vocab_size=270), show=False)
    pieces = corpus.tokenizer.token_bytes()
    assert b"training" in b"".join(pieces[id] for id in tokens_of(corpus.train)[:9])
    assert max(map(len, pieces)) > 3
    assert [pieces[id] for id in tokens_of(corpus.val)[-1600:]] == [b"z", b"q"] * 800


def test_a_long_text_encoded_in_pieces_is_the_text_encoded_whole(config):
    text = "".join(python_topics())
    Path(config.source).write_text(text, encoding="utf-8")
    corpus = prepare(replace(config, val_fraction=0.0), TokenizerConfig(kind="bpe", vocab_size=400), show=False)
    assert len(text) > 3 * PIECE
    assert tokens_of(corpus.train).tolist() == [*corpus.tokenizer.encode(text), corpus.tokenizer.eot]


def test_documents_end_in_end_of_text_and_every_tenth_is_held_out(config, tmp_path):
    texts = [f"document {i}" for i in range(20)]
    source = tmp_path / "many.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = prepare(replace(config, source=str(source)), BYTE, show=False)
    train = [id for i, text in enumerate(texts) if i % 10 for id in [*text.encode(), 256]]
    assert tokens_of(corpus.train).tolist() == train
    assert tokens_of(corpus.val).tolist() == [*b"document 0", 256, *b"document 10", 256]
    assert corpus.counts["train"]["documents"] == 18


def test_the_default_corpus_needs_no_file(tmp_path):
    corpus = prepare(DataConfig(folder=str(tmp_path)), BYTE, show=False)
    texts = python_topics()
    train = b"\0".join(text.encode() for i, text in enumerate(texts) if i % 10)
    assert corpus.counts["train"]["bytes"] + corpus.counts["val"]["bytes"] == sum(len(t.encode()) for t in texts)
    assert tokens_of(corpus.train)[:-1].tolist() == [256 if byte == 0 else byte for byte in train]
    assert corpus.manifest["source"]["python"].count(".") == 2
    ids, targets = Batches(corpus.train, 128, 4, 0).read(0)
    assert ids.shape == targets.shape


def test_a_val_fraction_of_zero_trains_on_everything(config):
    corpus = prepare(replace(config, val_fraction=0.0), BYTE, show=False)
    assert tokens_of(corpus.train).tolist() == [*TEXT.encode(), 256]
    assert len(corpus.val) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_val_fraction_is_refused(config, fraction):
    with pytest.raises(ConfigError, match=r"data.val_fraction is"):
        prepare(replace(config, val_fraction=fraction), BYTE, show=False)


def test_preparing_again_writes_nothing_and_reads_no_text(config, monkeypatch):
    first = prepare(config, BYTE, show=False)
    before = snapshot(config.folder)
    monkeypatch.setattr(preparing, "survey", None)
    again = prepare(config, BYTE, show=False)
    assert snapshot(config.folder) == before
    assert (again.folder, again.hash) == (first.folder, first.hash)


def test_opening_what_was_prepared_loads_neither_torch_nor_a_tokenizer(config):
    prepare(config, BYTE, show=False)
    code = f"""
import sys
from minigpt.data.config import DataConfig
from minigpt.data.prepare import prepare
from minigpt.tokenizer.config import TokenizerConfig
prepare(DataConfig(source={config.source!r}, folder={config.folder!r}), TokenizerConfig(kind="byte"), show=False)
print([name for name in ("torch", "tiktoken", "tokenizers", "minigpt.tokenizer.build") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_same_text_at_another_time_keeps_its_tokens(config):
    first = prepare(config, BYTE, show=False)
    before = snapshot(config.folder)
    os.utime(config.source, ns=(1, 1))
    assert prepare(config, BYTE, show=False).hash == first.hash
    changed = {Path(path).name for path, state in snapshot(config.folder).items() if before.get(path) != state}
    assert changed == {"manifest.json"}
    open_corpus(first.folder).verify()


def test_whatever_decides_the_tokens_decides_the_folder(config):
    made = [prepare(config, BYTE, show=False), prepare(config, CHAR, show=False)]
    made.append(prepare(replace(config, val_fraction=0.2), BYTE, show=False))
    made.append(prepare(replace(config, clean=CleanConfig(lowercase=True)), BYTE, show=False))
    Path(config.source).write_text(TEXT + "more")
    made.append(prepare(config, BYTE, show=False))
    assert len({corpus.folder for corpus in made}) == len({corpus.hash for corpus in made}) == 5
    for corpus in made:
        corpus.verify()


def test_text_is_cleaned_before_it_is_split(config):
    Path(config.source).write_text("<p>" + "AB" * 50 + "</p>")
    corpus = prepare(replace(config, clean=CleanConfig(strip_html=True, lowercase=True)), BYTE, show=False)
    text = "ab" * 50 + "\n"
    assert bytes([*tokens_of(corpus.train), *tokens_of(corpus.val)]).decode() == text
    assert len(corpus.train) == int(len(text) * 0.9)


def test_what_was_left_out_is_announced_and_recorded(config, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, content in {"a.txt": b"text \xff\xfe", "b.bin": b"\0", "c.txt": b"", "d.txt": b"more"}.items():
        (folder / name).write_bytes(content)
    corpus = prepare(replace(config, source=str(folder)), BYTE)
    said = capsys.readouterr().err
    assert "mixed: skipped, not text: " in said
    assert "b.bin" in said
    assert "mixed: 2 invalid byte sequences were replaced by U+FFFD, the first in " in said
    assert "mixed: dropped 1 empty of 3 documents" in said
    assert (corpus.manifest["invalid"], corpus.manifest["dropped"]) == (2, {"empty": 1})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), DataError("bad line")])
def test_an_interrupted_preparation_leaves_no_half_corpus(config, monkeypatch, error):
    def fail(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("minigpt.data.encode.ShardWriter.close", fail)
        with pytest.raises(
            DiskError if isinstance(error, OSError) else type(error) if isinstance(error, Exception) else error
        ):
            prepare(config, BYTE, show=False)
    assert list((Path(config.folder) / "book").iterdir()) == []
    prepare(config, BYTE, show=False).verify()


def test_two_preparations_at_once_both_succeed(config):
    made, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: made.append(prepare(config, BYTE, show=False))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len({corpus.folder for corpus in made}) == 1
    assert [path.name for path in (Path(config.folder) / "book").iterdir()] == [made[0].folder.name]


def test_what_a_killed_process_left_is_swept_away_after_a_day(config):
    old, new = (Path(config.folder) / "book" / name for name in (".preparing-old", ".preparing-new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    prepare(config, BYTE, show=False)
    assert not old.exists()
    assert new.exists()


def test_an_unfinished_folder_is_never_opened(config):
    corpus = prepare(config, BYTE, show=False)
    os.rename(corpus.folder, corpus.folder.with_name(".preparing-0"))
    assert prepare(config, BYTE, show=False).folder == corpus.folder


def test_a_file_in_the_way_is_a_disk_error(config):
    Path(config.folder).mkdir()
    (Path(config.folder) / "book").write_text("in the way")
    with pytest.raises(DiskError, match=r"the corpus .* cannot be written .*--data\.folder"):
        prepare(config, BYTE, show=False)


def damage(corpus, name, change) -> None:
    path = corpus.folder / name
    path.write_bytes(change(path.read_bytes()))


def test_a_missing_shard_is_named(config):
    corpus = prepare(config, BYTE, show=False)
    (corpus.folder / "val-00000.bin").unlink()
    for opening in (lambda: open_corpus(corpus.folder), lambda: prepare(config, BYTE, show=False)):
        with pytest.raises(DataError, match=r"val-00000.bin is missing; delete .* prepare the corpus again"):
            opening()


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:-2], lambda c: c + b"\0\0", lambda c: b""])
def test_a_truncated_or_longer_shard_is_named_with_its_bytes(config, change):
    corpus = prepare(config, BYTE, show=False)
    expected = 2 * len(corpus.val)
    damage(corpus, "val-00000.bin", change)
    found = (corpus.folder / "val-00000.bin").stat().st_size
    with pytest.raises(DataError, match=rf"val-00000.bin has {found} bytes, expected {expected}"):
        open_corpus(corpus.folder)


@pytest.mark.parametrize("place", [0, 1, 777, -1])
def test_one_altered_bit_is_found_by_verify(config, place):
    corpus = prepare(config, BYTE, show=False)

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 1
        return bytes(changed)

    damage(corpus, "train-00000.bin", flip)
    with pytest.raises(
        DataError, match=r"train-00000.bin was altered: its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"
    ):
        open_corpus(corpus.folder).verify()


def test_an_id_outside_the_vocabulary_never_reaches_a_batch(config):
    corpus = prepare(config, BYTE, show=False)
    damage(corpus, "train-00000.bin", lambda c: c[:200] + (999).to_bytes(2, "little") + c[202:])
    with pytest.raises(DataError, match=r"train-00000.bin contains id 999 at token 100, .* 257 ids"):
        tokens_of(open_corpus(corpus.folder).train)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.replace(b'"vocab_size": 257', b'"vocab_size": 999'),
        lambda c: c.replace(b'"format": 1', b'"format": 2'),
        lambda c: c[:-20],
        lambda c: b"[]",
        lambda c: b"{}",
        lambda c: b"\xff",
    ],
)
def test_a_tampered_manifest_is_named(config, change):
    corpus = prepare(config, BYTE, show=False)
    damage(corpus, "manifest.json", change)
    for opening in (lambda: open_corpus(corpus.folder), lambda: prepare(config, BYTE, show=False)):
        with pytest.raises(DataError, match=r"manifest.json .*prepare the corpus again"):
            opening()


def test_a_folder_without_a_manifest_holds_no_corpus(tmp_path):
    with pytest.raises(DataError, match="is not a prepared corpus"):
        open_corpus(tmp_path)


def test_another_tokenizer_is_refused(config):
    byte, char = prepare(config, BYTE, show=False), prepare(config, CHAR, show=False)
    byte.check_tokenizer(byte.tokenizer)
    with pytest.raises(DataError, match=r"prepared with the byte tokenizer .*, not with the char tokenizer"):
        byte.check_tokenizer(char.tokenizer)
    exchanged = (char.folder / "minigpt_tokenizer.json").read_bytes()
    (byte.folder / "minigpt_tokenizer.json").write_bytes(exchanged)
    with pytest.raises(DataError, match="byte tokenizer"):
        _ = open_corpus(byte.folder).tokenizer


def test_the_manifest_describes_every_byte(config):
    corpus = prepare(config, BYTE, show=False)
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert manifest["tokenizer"] == {"kind": "byte", "hash": corpus.tokenizer.hash}
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        (shard,) = manifest["splits"][split]["shards"]
        content = (corpus.folder / shard["file"]).read_bytes()
        assert shard["tokens"] * 2 == len(content) == 2 * len(stream)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    files = {"manifest.json", "minigpt_tokenizer.json", "train-00000.bin", "val-00000.bin"}
    assert {path.name for path in corpus.folder.iterdir()} == files


def test_large_vocabularies_take_four_bytes_a_token(config, monkeypatch):
    from minigpt.tokenizer.plain import ByteTokenizer

    class Wide(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 65_537

    monkeypatch.setattr("minigpt.tokenizer.build.build_tokenizer", lambda *_: Wide())
    corpus = prepare(config, BYTE, show=False)
    assert corpus.manifest["dtype"] == "uint32"
    assert (corpus.folder / "val-00000.bin").stat().st_size == 4 * len(corpus.val)
    assert bytes(tokens_of(corpus.val).tolist()).decode() == TEXT[int(len(TEXT) * 0.9) :]


def test_many_shards_are_one_stream(config, monkeypatch):
    whole = tokens_of(prepare(config, BYTE, show=False).train)
    monkeypatch.setattr(preparing, "ShardWriter", lambda *args: ShardWriter(*args, limit=500))
    corpus = prepare(replace(config, folder=config.folder + "2"), BYTE, show=False)
    assert len(corpus.train.paths) > 5
    assert (tokens_of(corpus.train) == whole).all()
    corpus.verify()


def test_a_folder_that_goes_while_old_ones_are_swept_away_is_no_error(config, monkeypatch):
    home = Path(config.folder) / "book"
    (home / ".preparing-gone").mkdir(parents=True)
    real = Path.stat

    def stat(path, **options):
        if path.name == ".preparing-gone" and path.exists():
            path.rmdir()
        return real(path, **options)

    monkeypatch.setattr(Path, "exists", lambda path: os.path.exists(path))
    monkeypatch.setattr(Path, "stat", stat)
    assert len(prepare(config, BYTE, show=False).train)
