"""Kinds byte and char, streaming, the config's errors, and the tokenizer file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.errors import ConfigError, DataError, DiskError
from minigpt.tokenizer.build import (
    build_tokenizer,
    load_tokenizer,
    needs_corpus,
    save_tokenizer,
    tokenizer_from_dict,
)
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.plain import ByteTokenizer, CharTokenizer

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)
BYTE = ByteTokenizer()


def char_tokenizer(text: str, unknown: str = "error") -> CharTokenizer:
    tokenizer = build_tokenizer(TokenizerConfig(kind="char", unknown=unknown), lambda: iter([text]))
    assert isinstance(tokenizer, CharTokenizer)
    return tokenizer


def test_bytes_are_their_own_ids_and_256_ends_a_text():
    assert BYTE.encode("hé") == [104, 0xC3, 0xA9]
    assert (BYTE.vocab_size, BYTE.eot) == (257, 256)
    assert BYTE.decode([104, 256, 105]) == "h<|endoftext|>i"
    assert BYTE.token_bytes() == [bytes([byte]) for byte in range(256)] + [b""]


@steady
@given(st.text())
def test_any_text_survives_the_byte_tokenizer(text):
    assert BYTE.decode(BYTE.encode(text)) == text
    assert BYTE.encode(text) == list(text.encode("utf-8"))


@steady
@given(st.text(min_size=1))
def test_any_text_survives_its_own_char_tokenizer(text):
    tokenizer = char_tokenizer(text)
    characters = sorted(set(text))
    assert tokenizer.encode(text) == [characters.index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(tokenizer.token_bytes()).decode("utf-8") == "".join(characters)


@steady
@given(st.binary())
def test_a_stream_of_any_bytes_gives_what_decoding_them_at_once_gives(data):
    stream = BYTE.stream_decoder()
    assert "".join(stream.push(byte) for byte in data) + stream.flush() == data.decode("utf-8", "replace")


def test_a_stream_gives_whole_characters_only():
    stream = BYTE.stream_decoder()
    assert [stream.push(byte) for byte in "é漢😀".encode()] == ["", "é", "", "", "漢", "", "", "", "😀"]
    assert stream.flush() == ""


def test_a_stream_that_ends_within_a_character_shows_it_as_broken_and_can_be_used_again():
    stream = BYTE.stream_decoder()
    assert stream.push("漢".encode()[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(ord("a")) == "a"


def test_the_char_vocabulary_is_the_sorted_characters_without_special_tokens():
    tokenizer = char_tokenizer("hello\n")
    assert tokenizer.characters == ["\n", "e", "h", "l", "o"]
    assert tokenizer.encode("hole") == [2, 4, 3, 1]
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.specials) == (5, None, {})


def test_an_unknown_character_is_shown_with_its_code_and_place():
    tokenizer = char_tokenizer("hello")
    with pytest.raises(DataError) as caught:
        tokenizer.encode("hell€o")
    for part in ("'€'", "U+20AC", "position 4", "4 characters", "--tokenizer.unknown drop"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "character", ["\0", "i", "m", "\U0010ffff"]
)  # below, between, just past and far past the known
def test_unknown_characters_are_dropped_where_that_is_asked_for(character):
    tokenizer = char_tokenizer("hjl", unknown="drop")
    assert tokenizer.decode(tokenizer.encode(f"h{character}jl{character}")) == "hjl"
    assert tokenizer_from_dict(tokenizer.to_dict()).encode(character) == []


def test_a_lone_surrogate_is_encoded_as_the_replacement_character():
    assert BYTE.decode(BYTE.encode("a\ud800b")) == "a\ufffdb"
    tokenizer = char_tokenizer("a\ud800b")
    assert tokenizer.decode(tokenizer.encode("\udfffab")) == "\ufffdab"


def test_a_text_may_be_cut_anywhere_for_kinds_byte_and_char():
    text = "né\n x"
    for tokenizer in (BYTE, char_tokenizer(text)):
        places = [match.start() for match in tokenizer.cut.finditer(text)]
        assert places == list(range(len(text) + 1))
        assert [id for piece in text for id in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_batch_is_each_text_by_itself():
    texts = ["", "héllo", "h"]
    for tokenizer in (BYTE, char_tokenizer("".join(texts))):
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
        assert all(ids.dtype == np.uint32 and ids.ndim == 1 for ids in batch)


def test_the_end_of_text_written_in_a_text_is_ordinary_text():
    text = "a<|endoftext|>b"
    assert 256 not in BYTE.encode(text)
    tokenizer = char_tokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("id", [-1, 257, 10**6])
def test_an_id_outside_the_vocabulary_is_named(id):
    with pytest.raises(DataError, match=f"token id {id} is not in the byte vocabulary"):
        BYTE.decode([1, id])
    with pytest.raises(DataError, match=f"token id {id}"):
        BYTE.stream_decoder().push(id)


def test_ids_may_be_arrays():
    assert BYTE.decode(np.array([104, 105], dtype=np.uint16)) == "hi"
    assert BYTE.decode(iter([104, 105])) == "hi"


def test_an_empty_corpus_has_no_characters():
    with pytest.raises(DataError, match="the corpus is empty"):
        char_tokenizer("")


def test_only_char_and_bpe_need_a_corpus():
    assert [kind for kind in ("byte", "char", "bpe", "gpt2", "o200k") if needs_corpus(TokenizerConfig(kind=kind))] == [
        "char",
        "bpe",
    ]
    with pytest.raises(ConfigError, match="takes its vocabulary from a corpus"):
        build_tokenizer(TokenizerConfig(kind="char"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "gtp2"}, "did you mean 'gpt2'"),
        ({"kind": "char", "unknown": "ignore"}, "tokenizer.unknown is 'ignore'"),
        ({"kind": "bpe", "vocab_size": 256}, "at least 257"),
        ({"kind": "file"}, "tokenizer.path is empty"),
        ({"kind": "byte", "path": "x"}, "set tokenizer.kind to file"),
    ],
)
def test_a_config_that_cannot_be_is_told_at_once(fields, said):
    with pytest.raises(ConfigError, match=said):
        TokenizerConfig(**fields)


def test_the_config_imports_nothing_heavy():
    script = "import sys, minigpt.tokenizer.config as c; print({'numpy', 'torch', 'tiktoken'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("tokenizer", [BYTE, char_tokenizer("naïve 漢\n\x1f😀")], ids=["byte", "char"])
def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    path = save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    assert path.name == "minigpt_tokenizer.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for place in (path, path.parent):
        again = load_tokenizer(place)
        assert (type(again), again.hash, again.vocab_size) == (type(tokenizer), tokenizer.hash, tokenizer.vocab_size)
        assert again.encode("naïve 漢\n") == tokenizer.encode("naïve 漢\n")
    copied = path.rename(tmp_path / "copied.json")
    assert load_tokenizer(copied).hash == tokenizer.hash


def test_different_tokenizers_have_different_hashes():
    hashes = {BYTE.hash, char_tokenizer("ab").hash, char_tokenizer("abc").hash, char_tokenizer("ab", "drop").hash}
    assert len(hashes) == 4


def test_any_flipped_byte_of_the_file_is_found_and_the_file_named(tmp_path):
    path = save_tokenizer(char_tokenizer("hé 漢"), tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"minigpt_tokenizer\.json"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"format": 2, "hash": "", "tokenizer": {}}', "\udcff"])
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    path = tmp_path / "minigpt_tokenizer.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"minigpt_tokenizer\.json"):
        load_tokenizer(path)


def test_a_kind_of_a_later_version_is_named(tmp_path):
    with pytest.raises(DataError, match="tokenizer kind 'syllable'"):
        tokenizer_from_dict({"kind": "syllable"})


def test_a_missing_file_and_an_empty_folder_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"neither minigpt_tokenizer.json nor tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"minigpt_tokenizer\.json: cannot be written"):
        save_tokenizer(BYTE, tmp_path / "file")


def test_the_description_is_json_and_complete(tmp_path: Path):
    for tokenizer in (BYTE, char_tokenizer("héllo")):
        description = json.loads(json.dumps(tokenizer.to_dict()))
        assert tokenizer_from_dict(description).hash == tokenizer.hash
