"""Kind file: tokenizer.json of every family, against the `tokenizers` library that wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from minigpt.errors import DataError
from minigpt.tokenizer.build import build_tokenizer, load_tokenizer, save_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.huggingface import HuggingFaceTokenizer
from tokenizer_files import (
    PROSE,
    SPECIALS,
    byte_level,
    gemma,
    metaspace,
    no_prefix,
    sentencepiece,
    word_endings,
    wordpiece,
    words,
)

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)


FAMILIES = {make.__name__: make() for make in (byte_level, sentencepiece, gemma, metaspace, no_prefix, wordpiece)}
FAMILIES["word_endings"] = word_endings()
FAMILIES["words"] = words()
OURS = {name: HuggingFaceTokenizer(library.to_str(), eot=None) for name, library in FAMILIES.items()}
families = pytest.mark.parametrize("family", FAMILIES)
TEXTS = [*PROSE[:3], "", " the", "  the cats", "the ", "naïve é\n", "the cat, the cats.", "a    b"]


def folder_of(tokenizer: Tokenizer, folder: Path, **files: dict) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@families
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_the_librarys(family, text):
    ours, library = OURS[family], FAMILIES[family]
    ids = ours.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@families
@steady
@given(data=st.data())
def test_a_stream_of_any_ids_gives_what_decoding_them_at_once_gives(family, data):
    tokenizer = OURS[family]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream_decoder()
    for _ in range(2):  # a flushed stream begins anew
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert tokenizer.decode_bytes(ids).decode("utf-8", "replace") == tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["byte_level", "gemma"])
@steady
@given(text=st.text())
def test_any_text_survives_where_nothing_is_normalized(family, text):
    text = text.replace("▁", "")  # the mark itself is taken for a space
    assert OURS[family].decode(OURS[family].encode(text)) == text


@steady
@given(data=st.data())
def test_any_ids_of_a_byte_level_vocabulary_are_decoded_as_the_library_does(data):
    ids = data.draw(st.lists(st.integers(0, OURS["byte_level"].vocab_size - 1)))
    assert OURS["byte_level"].decode(ids) == FAMILIES["byte_level"].decode(ids, skip_special_tokens=False)


def test_bytes_that_are_no_text_are_kept_by_decode_bytes():
    tokenizer = OURS["sentencepiece"]
    ids = [FAMILIES["sentencepiece"].token_to_id(text) for text in ("<0x41>", "<0xE6>", "<0xBC>")]
    assert tokenizer.decode_bytes(ids) == b"A\xe6\xbc"
    assert tokenizer.decode(ids) == "A\ufffd"


@families
def test_special_tokens_written_in_a_text_are_ordinary_text(family):
    tokenizer, library = OURS[family], FAMILIES[family]
    special = {library.token_to_id(text) for text in SPECIALS}
    assert set(library.encode("the</s>", add_special_tokens=False).ids) & special  # they would be found
    for text in ("</s>", "the</s><s>", "</s> the <s> cat"):
        assert not set(tokenizer.encode(text)) & special
    assert set(tokenizer.specials) >= set(SPECIALS)
    assert all(tokenizer.token_bytes()[id] == b"" for id in special)


def test_the_end_of_text_stays_ordinary_even_where_the_file_does_not_mark_it_special(tmp_path):
    library = byte_level()
    library.add_tokens([AddedToken("<|im_end|>", normalized=False)])
    folder_of(library, tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot == library.token_to_id("<|im_end|>")
    assert tokenizer.eot not in tokenizer.encode("the<|im_end|>")
    assert tokenizer.token_bytes()[tokenizer.eot] == b""


def test_token_bytes_are_what_the_ids_stand_for():
    tokenizer = OURS["byte_level"]
    text = "žluťoučký kůň 漢字 😀"
    assert b"".join(tokenizer.token_bytes()[id] for id in tokenizer.encode(text)) == text.encode()
    spaced = OURS["sentencepiece"]
    assert b"".join(spaced.token_bytes()[id] for id in spaced.encode("the cat 漢")) == b" the cat " + "漢".encode()


@families
def test_a_batch_is_each_text_by_itself(family):
    batch = OURS[family].encode_batch([*TEXTS, "a\ud800b"])
    assert [ids.tolist() for ids in batch] == [OURS[family].encode(text) for text in [*TEXTS, "a\ufffdb"]]
    assert all(ids.dtype == np.uint32 and ids.ndim == 1 for ids in batch)


def test_truncation_padding_and_dropout_in_the_file_do_not_touch_texts():
    library = byte_level()
    plain = library.encode(PROSE[0], add_special_tokens=False).ids
    library.enable_truncation(4)
    library.enable_padding(length=60)
    library.model.dropout = 0.9
    assert HuggingFaceTokenizer(library.to_str()).encode_batch([PROSE[0]])[0].tolist() == plain


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<s>"}, "config": {"eos_token_id": 1}}, 0),
        ({"tokenizer_config": {"eos_token": {"content": "<s>"}}}, 0),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<s>"}}, 0),
        ({"generation_config": {"eos_token_id": [7, 0]}, "config": {"eos_token_id": 0}}, 7),
        ({"config": {"eos_token_id": 0}}, 0),
        ({"config": {"eos_token_id": 10**6}}, 1),  # </s>
        ({}, 1),
    ],
)
def test_the_token_that_ends_a_text_is_read_from_the_files_beside_it(files, expected, tmp_path):
    assert load_tokenizer(folder_of(byte_level(), tmp_path, **files)).eot == expected


def test_a_vocabulary_without_an_ending_token_has_none(tmp_path):
    library = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = load_tokenizer(folder_of(library, tmp_path))
    assert (tokenizer.eot, tokenizer.cut, tokenizer.vocab_size) == (None, None, 2)


def test_unused_ids_stand_for_nothing():
    library = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    library.decoder = decoders.ByteLevel()
    tokenizer = HuggingFaceTokenizer(library.to_str())
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([0, 3, 5]) == "ab"


@families
def test_a_saved_one_is_the_same_and_needs_no_other_file(family, tmp_path):
    (tmp_path / "theirs").mkdir()
    folder = folder_of(FAMILIES[family], tmp_path / "theirs", tokenizer_config={"eos_token": "<s>"})
    tokenizer = build_tokenizer(TokenizerConfig(kind="file", path=str(folder)))
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path))
    assert (again.kind, again.hash, again.eot) == ("file", tokenizer.hash, tokenizer.eot)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_our_file_is_read_where_a_folder_holds_both(tmp_path):
    save_tokenizer(OURS["gemma"], folder_of(byte_level(), tmp_path))
    assert load_tokenizer(tmp_path).hash == OURS["gemma"].hash
    assert load_tokenizer(tmp_path / "tokenizer.json").hash != OURS["gemma"].hash


@pytest.mark.parametrize("content", ['{"model": {"type": "BPE"}}', '{"version": "1.0"}'])
def test_a_file_that_the_library_cannot_read_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'tokenizer.json'} cannot be read by tokenizers")):
        load_tokenizer(tmp_path)


def test_a_broken_file_beside_it_is_named(tmp_path):
    folder_of(byte_level(), tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_megabyte_of_blanks_is_encoded():
    tokenizer = OURS["byte_level"]
    text = " " * (1 << 20) + "x"
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_the_library_has_what_the_module_relies_on():
    assert tuple(map(int, tokenizers.__version__.split(".")[:2])) >= (0, 21)
