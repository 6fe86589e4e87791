import hashlib

import pytest

from minigpt.data.config import CleanConfig
from minigpt.data.corpus import Source
from minigpt.data.reading import Piece
from minigpt.data.survey import Part, Split, survey
from minigpt.errors import DataError


def source_of(texts: list[str], size: int = 10**9) -> Source:
    """Documents, each in pieces of `size` characters."""

    def documents(log):
        for text in texts:
            for begin in range(0, len(text), size):
                yield Piece(text[begin : begin + size], False)
            yield Piece("", True)

    return Source("test", {}, 0, documents)


def joined(parts: list[Part]) -> dict[str, list[str]]:
    """The texts of each split, parts put together until one ends."""
    out = {"train": [""], "val": [""]}
    for part in parts:
        out[part.split][-1] += part.text
        if part.ends:
            out[part.split].append("")
    assert all(texts.pop() == "" for texts in out.values())
    return out


def test_one_document_is_split_as_nanogpt_splits():
    # nanoGPT: train_data = data[:int(n*0.9)]
    text = "".join(chr(0x4E00 + i % 997) for i in range(1_115_394))
    found = survey(source_of([text], 70_001), CleanConfig(), show=False)
    split = Split(len(found.lengths), 0.1)
    parts = joined(list(found.parts(split)))
    assert parts == {"train": [text[: int(len(text) * 0.9)]], "val": [text[int(len(text) * 0.9) :]]}
    assert [len(parts["train"][0]), len(parts["val"][0])] == [1_003_854, 111_540]
    assert split.rule == "tail of each document"


@pytest.mark.parametrize(
    ("documents", "fraction", "held_out"),
    [
        (10, 0.1, [0]),
        (79, 0.1, [0, 10, 20, 30, 40, 50, 60, 70]),
        (9, 0.25, [0, 4, 8]),
        (2, 0.5, [0]),
        (4, 0.75, [0, 1, 2]),
        (1000, 0.002, [0, 500]),
    ],
)
def test_whole_documents_are_held_out_evenly(documents, fraction, held_out):
    split = Split(documents, fraction)
    assert split.rule == "whole documents"
    assert [i for i in range(documents) if split.train_length(i, 5) == 0] == held_out
    assert {split.train_length(i, 5) for i in range(documents)} == {0, 5}


@pytest.mark.parametrize(("documents", "fraction"), [(1, 0.1), (9, 0.1), (1, 0.99), (2, 0.9), (3, 0.3)])
def test_documents_too_few_to_hold_out_are_cut_at_the_end(documents, fraction):
    split = Split(documents, fraction)
    assert split.rule == "tail of each document"
    assert [split.train_length(i, 1000) for i in range(documents)] == [int(1000 * (1 - fraction))] * documents


def test_nothing_is_held_out_on_request():
    split = Split(1000, 0.0)
    assert split.rule == "all train"
    assert all(split.train_length(i, 7) == 7 for i in range(1000))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_parts_are_the_documents_wherever_pieces_end(size):
    texts = ["", "ab", "third text", "x", "a", "the sixth", "", "eight", "99"]
    config = CleanConfig(min_length=2)
    found = survey(source_of(texts, size), config, show=False)
    assert list(found.kept) == [0, 1, 1, 0, 0, 1, 0, 1, 1]
    assert list(found.lengths) == [2, 10, 9, 5, 2]
    assert found.dropped == {"empty": 2, "short": 2}
    assert found.sha256 == hashlib.sha256("\0".join(texts).encode()).hexdigest()

    whole = list(found.parts(Split(5, 0.4)))
    assert joined(whole) == {"train": ["third text", "eight", "99"], "val": ["ab", "the sixth"]}
    assert [part.text[-1] for part in whole if part.eot] == ["b", "t", "h", "t", "9"]

    cut = list(found.parts(Split(5, 0.15)))
    assert joined(cut) == {
        "train": ["a", "third te", "the six", "eigh", "9"],
        "val": ["b", "xt", "th", "t", "9"],
    }
    assert not any(part.eot for part in cut)


def test_equal_documents_are_kept_once_after_cleaning():
    texts = ["Same", "same", "other", "same ", "OTHER", ""]
    found = survey(source_of(texts, 3), CleanConfig(dedupe=True, lowercase=True), show=False)
    assert list(found.kept) == [1, 0, 1, 1, 0, 0]
    assert found.dropped == {"duplicate": 2, "empty": 1}
    assert joined(list(found.parts(Split(3, 0.0))))["train"] == ["same", "other", "same "]


@pytest.mark.parametrize(("texts", "message"), [([], "no documents"), (["", ""], "2 empty"), (["a"], "1 short")])
def test_a_corpus_of_nothing_is_refused(texts, message):
    with pytest.raises(DataError, match=rf"corpus 'test' has no text left \({message}\)"):
        survey(source_of(texts), CleanConfig(min_length=2), show=False)


@pytest.mark.parametrize("after", [["one", "tvo"], ["one"], ["one", "two", "three"], ["onet", "wo"], []])
def test_a_text_that_changes_between_the_passes_is_noticed(after):
    texts = ["one", "two"]
    found = survey(source_of(texts), CleanConfig(), show=False)
    texts[:] = after
    with pytest.raises(DataError, match="changed while it was being prepared"):
        list(found.parts(Split(2, 0.5)))
