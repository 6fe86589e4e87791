import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data import encode
from minigpt.data.encode import ShardWriter, cut_parts, encode_parts, groups
from minigpt.data.survey import Part
from minigpt.errors import DataError
from minigpt.terminal import progress


class Words:
    """A tokenizer whose tokens, numbered as they first come, are runs of letters, a blank before them included."""

    kind, eot, vocab_size, prefix_ids = "words", 0, 10_000, ()
    cut = re.compile(r"(?<=\S\n)(?=[^\W\d_])")

    def __init__(self):
        self.numbers = {"<|endoftext|>": 0}

    def encode_batch(self, texts):
        pattern = r" ?[^\W\d_]+|\s+|."
        return [np.array([self.number(word) for word in re.findall(pattern, text)], dtype=np.uint32) for text in texts]

    def number(self, word):
        return self.numbers.setdefault(word, len(self.numbers))


def parts_of(documents: list[tuple[str, str]], size: int) -> list[Part]:
    """Whole documents (split, text) in parts of `size` characters."""
    out = []
    for split, text in documents:
        for begin in range(0, len(text), size):
            last = begin + size >= len(text)
            out.append(Part(split, text[begin : begin + size], last, last))
    return out


TEXTS = st.text(st.sampled_from("ab \n."), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["train", "val"]), TEXTS), min_size=1, max_size=6), st.integers(1, 40))
def test_cut_parts_keep_text_ends_and_tokens(documents, size):
    words = Words()
    cut = list(cut_parts(parts_of(documents, size), words.cut, size=5))
    assert [(part.split, part.ends) for part in cut if part.ends] == [(split, True) for split, _ in documents]
    tokens, text, found = [], "", []
    for part in cut:
        tokens += words.encode_batch([part.text])[0].tolist()
        text += part.text
        if part.ends:
            found.append((part.split, text))
            assert tokens == words.encode_batch([text])[0].tolist()
            tokens, text = [], ""
    assert found == documents


def test_cut_parts_are_about_the_wanted_size():
    text = "some line\n" * 1000
    sizes = [len(part.text) for part in cut_parts(parts_of([("train", text)], 777), Words.cut, size=100)]
    assert all(100 <= size < 110 for size in sizes[:-1])
    assert 0 < sizes[-1] <= 110
    anywhere = [len(part.text) for part in cut_parts(parts_of([("train", text)], 777), re.compile(""), size=100)]
    assert anywhere == [100] * 100


def test_text_without_a_place_to_cut_is_cut_before_a_space_at_last(monkeypatch):
    monkeypatch.setattr(encode, "UNCUT", 50)
    for pattern in (Words.cut, None):
        cut = list(cut_parts(parts_of([("train", "aaa bb " * 40)], 33), pattern, size=10))
        assert "".join(part.text for part in cut) == "aaa bb " * 40
        assert all(40 < len(part.text) <= 50 for part in cut[:-1])
        assert all(part.text.startswith(" ") for part in cut[1:])
    unbroken = [part.text for part in cut_parts(parts_of([("train", "a" * 120)], 33), None, size=10)]
    assert "".join(unbroken) == "a" * 120
    assert max(map(len, unbroken)) <= 50


def test_a_tokenizer_without_cuts_gets_whole_documents():
    documents = [("train", "some line\n" * 100), ("val", "x")]
    assert [part.text for part in cut_parts(parts_of(documents, 33), None, size=10)] == [text for _, text in documents]


def test_groups_are_bounded():
    parts = [Part("train", "x" * size, True, True) for size in (5, 5, 1, 20, 0, 0, 3)]
    assert [[len(part.text) for part in group] for group in groups(parts, 10)] == [[5, 5], [1, 20], [0, 0, 3]]
    assert len(list(groups([Part("val", "", True, True)] * 100, 10))) == 10


@pytest.mark.parametrize("limit", [1, 7, 10, 100])
def test_shards_hold_at_most_their_limit_and_join_to_the_whole(tmp_path, limit):
    writer = ShardWriter(tmp_path, "val", "uint32", limit)
    ids = np.arange(65_530, 65_550, dtype=np.uint32)
    for begin, end in ((0, 3), (3, 3), (3, 15), (15, 20)):
        writer.write(ids[begin:end])
    writer.close()
    content = np.concatenate([np.fromfile(tmp_path / shard["file"], "<u4") for shard in writer.shards])
    assert content.tolist() == ids.tolist()
    assert [shard["tokens"] for shard in writer.shards[:-1]] == [limit] * (len(writer.shards) - 1)
    assert [shard["file"] for shard in writer.shards[:2]] == ["val-00000.bin", "val-00001.bin"][: len(writer.shards)]


def test_encoding_in_groups_is_encoding_each_document_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "cut_parts", lambda parts, cut: cut_parts(parts, cut, 20))
    monkeypatch.setattr(encode, "groups", lambda parts: groups(parts, 90))
    rng = np.random.default_rng(0)
    documents = [
        (["train", "val"][int(rng.integers(2))], "".join(rng.choice(list("abé \n."), rng.integers(1, 400))))
        for _ in range(40)
    ]
    words = Words()
    writers = {split: ShardWriter(tmp_path, split, "uint16", limit=1000) for split in ("train", "val")}
    with progress("", None, "", show=False) as bar:
        counts = encode_parts(parts_of(documents, 64), words, writers, bar)
    for split, writer in writers.items():
        texts = [text for s, text in documents if s == split]
        whole = [id for text in texts for id in [*words.encode_batch([text])[0], 0]]
        written = np.concatenate([np.fromfile(tmp_path / shard["file"], "<u2") for shard in writer.shards])
        assert written.tolist() == whole
        assert counts[split] == Counter(
            tokens=len(whole),
            bytes=len("".join(texts).encode()),
            characters=len("".join(texts)),
            documents=len(texts),
        )


@pytest.mark.parametrize(("eot", "expected"), [(9, [1, 2, 9]), (None, [1, 2])])
def test_only_whole_documents_end_in_end_of_text_where_there_is_one(tmp_path, eot, expected):
    class Letters:
        kind, vocab_size, cut, prefix_ids = "letters", 10, None, ()

        def encode_batch(self, texts):
            return [np.array([ord(letter) - 96 for letter in text], dtype=np.uint32) for text in texts]

    tokenizer = Letters()
    tokenizer.eot = eot
    writers = {split: ShardWriter(tmp_path, split, "uint16") for split in ("train", "val")}
    parts = [Part("train", "ab", True, True), Part("val", "ab", True, False)]
    with progress("", None, "", show=False) as bar:
        encode_parts(parts, tokenizer, writers, bar)
    assert np.fromfile(tmp_path / "train-00000.bin", "<u2").tolist() == expected
    assert np.fromfile(tmp_path / "val-00000.bin", "<u2").tolist() == [1, 2]


def test_a_tokenizer_that_exceeds_its_vocabulary_is_refused(tmp_path):
    words = Words()
    words.vocab_size = 3
    writers = {split: ShardWriter(tmp_path, split, "uint16") for split in ("train", "val")}
    with (
        progress("", None, "", show=False) as bar,
        pytest.raises(DataError, match=r"words tokenizer produced token id 3, .* 3 ids"),
    ):
        encode_parts([Part("train", "a b c", True, True)], words, writers, bar)
