"""Kind bpe: the trained vocabulary against a naive trainer, its encoding against the library that trained it."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from minigpt.errors import DataError
from minigpt.tokenizer import bpe, train_bpe
from minigpt.tokenizer.alphabet import BYTE_OF
from minigpt.tokenizer.bpe import BPETokenizer
from minigpt.tokenizer.build import build_tokenizer, load_tokenizer, save_tokenizer, tokenizer_from_dict
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.published import VOCABULARIES
from minigpt.tokenizer.train_bpe import SPLIT_PATTERN

steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)

PROSE = """It's a small corpus, 'tis true: we'll read it twice, or 12345 times.
The small cat sat; the other cats sat there. They're all cats, aren't they?

    def cat(self, other):  # 2024-01-31
        return self.other[cat] + "…"\r
Žluťoučký kůň, naïve café; 小さな猫が座った。小さな猫が座った。 हिन्दी में लिखा है, हिन्दी में। 😀😀 ❤️
"""
PATTERNS = {"bpe": SPLIT_PATTERN} | {kind: vocabulary.pattern for kind, vocabulary in VOCABULARIES.items()}


def trained(text: str = PROSE, vocab_size: int = 320) -> BPETokenizer:
    tokenizer = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=vocab_size), lambda: iter([text]), show=False)
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


TRAINED = trained()


def naive_tokens(text: str, vocab_size: int) -> list[bytes]:
    """The tokens a BPE trainer learns, by counting everything anew for each: the definition, and slow.

    Of pairs seen equally often it takes the one whose first token, then second, is older; bytes are as old as their
    places in GPT-2's vocabulary say: the printable ones first.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = plain + [byte for byte in range(256) if byte not in plain]
    age = {bytes([byte]): place for place, byte in enumerate(order)}
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in regex.findall(SPLIT_PATTERN, text))
    while len(age) < vocab_size - 1:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        pair = max(pairs, key=lambda pair: (pairs[pair], -age[pair[0]], -age[pair[1]]), default=None)
        if pair is None or pairs[pair] < 2:
            break
        age.setdefault(pair[0] + pair[1], len(age))
        words = Counter({merged(word, pair): count for word, count in words.items()})
    return list(age)[256:]


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    out: list[bytes] = []
    for token in word:
        out.append(token)
        if tuple(out[-2:]) == pair:
            out[-2:] = [pair[0] + pair[1]]
    return tuple(out)


def library_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """The same training with nothing cut, run through the trained `tokenizers` object's own encoding."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = train_bpe.splitter(SPLIT_PATTERN)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=list(BYTE_OF), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def babble(seed: int, alphabet: str, words: int = 60, longest: int = 12) -> str:
    """Words without a language: their repetitions and runs make the hardest ties."""
    dice = random.Random(seed)
    return " ".join("".join(dice.choices(alphabet, k=dice.randint(1, longest))) for _ in range(words))


@pytest.mark.parametrize(
    ("text", "vocab_size"),
    [(PROSE * 3, 420), *((babble(seed, alphabet), 290) for seed in range(8) for alphabet in ("ab", "aaab", "abcdef"))],
)
def test_training_learns_what_the_naive_trainer_learns(text, vocab_size):
    tokens = trained(text, vocab_size).tokens
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert tokens[256:] == naive_tokens(text, vocab_size)


@pytest.mark.parametrize("text", [PROSE * 3, *(babble(seed, "aab") for seed in range(8))])
def test_encoding_equals_that_of_the_library_that_trained(text):
    ours, library = trained(text, 330), library_tokenizer(text, 330)
    spelled = {id: bytes(BYTE_OF[character] for character in token) for token, id in library.get_vocab().items()}
    for probe in (text, PROSE[::-1], babble(99, "aab"), "aaaa" * 9 + "baab"):
        theirs = [spelled[id] for id in library.encode(probe).ids]
        assert [ours.tokens[id] for id in ours.encode(probe)] == theirs


def tiktoken_splits(pattern: str, texts: list[str]) -> list[list[str]]:
    """How tiktoken splits: with every part of the texts per token, shorter ones first, each split becomes one token."""
    parts = {bytes([byte]) for byte in range(256)}
    for data in (text.encode() for text in texts):
        parts |= {data[i:j] for i in range(len(data)) for j in range(i + 1, len(data) + 1)}
    ranks = {part: rank for rank, part in enumerate(sorted(parts, key=lambda part: (len(part), part)))}
    encoding = tiktoken.Encoding("parts", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [[encoding.decode([id]) for id in encoding.encode_ordinary(text)] for text in texts]


def test_the_pattern_splits_alike_in_both_libraries():
    dice = random.Random(0)
    texts = [PROSE[i : i + 20] for i in range(0, len(PROSE), 10)]
    texts += [
        "".join(dice.choices("aLs'e9² .\n\r\t\u0301\u00a0\u3000漢हि😀_\x1c\u017f\u212a", k=10)) for _ in range(400)
    ]
    split = train_bpe.splitter(SPLIT_PATTERN)[0]
    assert [[part for part, _ in split.pre_tokenize_str(text)] for text in texts] == tiktoken_splits(
        SPLIT_PATTERN, texts
    )


def test_the_pattern_splits_as_its_description_says():
    assert tiktoken_splits(SPLIT_PATTERN, ["it's 'tis 1234 हिन्दी!\n\n  a", "We'LL go"]) == [
        ["it", "'s", " '", "tis", " ", "12", "34", " हिन्दी", "!\n\n", " ", " a"],
        ["We", "'LL", " go"],
    ]


@steady
@given(st.text())
def test_any_text_survives(text):
    assert TRAINED.decode(TRAINED.encode(text)) == text


@steady
@given(st.lists(st.integers(0, TRAINED.vocab_size - 1)))
def test_a_stream_of_any_ids_gives_what_decoding_them_at_once_gives(ids):
    stream = TRAINED.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.flush() == TRAINED.decode(ids)
    assert TRAINED.decode_bytes(ids).decode("utf-8", "replace") == TRAINED.decode(ids)


SIGNS = "aÉ字7²'s\u0301 \n\r\t\x1c./_"


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_text_cut_at_line_starts_gives_the_ids_of_the_whole(kind):
    pairs = sorted({(one + other).encode() for one in SIGNS for other in SIGNS})  # so that whatever may merge, does
    parts = {pair[start:end] for pair in pairs for start in range(3) for end in range(start + 2, len(pair) + 1)}
    tokens = [*TRAINED.tokens[:256], *sorted(parts, key=lambda part: (len(part), part))]
    tokenizer = BPETokenizer(kind, PATTERNS[kind], tokens, {"<|endoftext|>": len(tokens)})

    @settings(steady, max_examples=200)
    @given(st.text(st.sampled_from(SIGNS + "\n\n\n./"), min_size=20))
    def holds(text):
        places = [0, *(match.start() for match in tokenizer.cut.finditer(text)), len(text)]
        pieces = [tokenizer.encode(text[start:end]) for start, end in pairwise(places)]
        assert [id for ids in pieces for id in ids] == tokenizer.encode(text)

    holds()
    assert [match.start() for match in tokenizer.cut.finditer("one\ntwo\n\nthree\n 4")] == [4]


def test_a_batch_is_each_text_by_itself():
    texts = ["", PROSE, "cat", "a\ud800b"]
    batch = TRAINED.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [TRAINED.encode(text) for text in texts]
    assert all(ids.dtype == np.uint32 and ids.ndim == 1 for ids in batch)
    assert TRAINED.encode_batch([]) == []
    assert TRAINED.decode(batch[3]) == "a\ufffdb"


def test_the_end_of_text_is_the_last_id_and_ordinary_when_written():
    assert TRAINED.eot == TRAINED.vocab_size - 1 == 319
    assert TRAINED.eot not in TRAINED.encode("a<|endoftext|>b")
    assert TRAINED.decode(TRAINED.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert TRAINED.decode([TRAINED.eot]) == "<|endoftext|>"
    assert TRAINED.token_bytes() == [*TRAINED.tokens, b""]


def test_token_bytes_count_the_bytes_of_a_text():
    sizes = [len(token) for token in TRAINED.token_bytes()]
    assert sum(sizes[id] for id in TRAINED.encode(PROSE)) == len(PROSE.encode())


def test_a_corpus_too_small_gives_a_smaller_vocabulary_and_says_so(capsys):
    tokenizer = build_tokenizer(TokenizerConfig(kind="bpe"), lambda: iter(["abab"]))
    assert tokenizer.vocab_size == 258
    assert tokenizer.token_bytes()[256:] == [b"ab", b""]
    assert "gives 258 tokens instead of tokenizer.vocab_size 4096" in capsys.readouterr().err


def test_the_smallest_vocabulary_is_the_bytes_and_the_end_of_text():
    tokenizer = trained(vocab_size=257)
    assert tokenizer.encode("hé") == [104, 0xC3, 0xA9]
    assert tokenizer.eot == 256


def test_an_empty_corpus_is_refused_and_a_failing_one_fails_as_itself():
    with pytest.raises(DataError, match="the corpus is empty"):
        trained("")

    def failing():
        yield "some text"
        raise DataError("corpus file b.txt is broken")

    with pytest.raises(DataError, match=r"b\.txt"):
        build_tokenizer(TokenizerConfig(kind="bpe"), failing, show=False)


def test_training_on_long_texts_cut_into_portions_learns_the_same(monkeypatch):
    monkeypatch.setattr(train_bpe, "PORTION", 16)
    assert trained().hash == TRAINED.hash


def uncut_tokens(text: str, vocab_size: int) -> list[bytes]:
    """What the library learns from the whole splits."""
    spelled = sorted(library_tokenizer(text, vocab_size).get_vocab().items(), key=lambda item: item[1])
    return [bytes(BYTE_OF[character] for character in token) for token, _ in spelled[256:]]


def unspaced(alphabet: str, length: int) -> str:
    """Words of a language of 50, some frequent, some rare, without a space between them."""
    dice = random.Random(alphabet)
    words = ["".join(dice.choices(alphabet, k=dice.randint(2, 7))) for _ in range(50)]
    return "".join(dice.choices(words, [1 / rank for rank in range(1, 51)], k=length))[:length]


RUNS = {
    "dashes": "-" * 2000,
    "blanks": " " * 2000,
    "line ends": "\n" * 2000,
    "DNA": unspaced("ACGT", 6000),
    "Thai": unspaced("กขคงจฉชซฌญฎฏ", 6000),
    "hexadecimal": unspaced("ABCDEFabcdef", 6000),
}


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
def test_no_split_is_counted_in_pieces_longer_than_the_limit(text):
    """The trainer's time goes by the square of a piece, so this is what keeps it proportional to the text."""
    whole = train_bpe.splitter(SPLIT_PATTERN).pre_tokenize_str(text)
    cut = train_bpe.splitter(SPLIT_PATTERN, train_bpe.LONGEST).pre_tokenize_str(text)
    assert max(end - start for _, (start, end) in cut) <= train_bpe.LONGEST
    assert "".join(piece for piece, _ in cut) == "".join(piece for piece, _ in whole)
    assert "".join(text[start:end] for _, (start, end) in cut) == text  # between characters


@pytest.mark.parametrize("length", [1, 30, train_bpe.LONGEST - 1, train_bpe.LONGEST])
def test_words_up_to_the_limit_are_learned_as_by_the_whole_split(length):
    dice = random.Random(length)
    words = ["".join(dice.choices("abcก", k=length)) for _ in range(40)]
    text = PROSE + " ".join(dice.choices(words, k=60))
    # A space before a word is part of its split.
    text = text if length < train_bpe.LONGEST else "\n".join(text.split(" "))
    assert trained(text, 400).tokens[256:] == uncut_tokens(text, 400)


@pytest.mark.parametrize("name", ["dashes", "blanks", "line ends"])
def test_a_run_of_one_character_gives_the_tokens_of_the_uncut_run_up_to_the_limit(name):
    learned, whole = trained(RUNS[name], 300).tokens[256:], uncut_tokens(RUNS[name], 300)
    assert learned == [token for token in whole if len(token) <= train_bpe.LONGEST]
    assert len(learned[-1]) == train_bpe.LONGEST < len(whole[-1])


@pytest.mark.parametrize("name", ["DNA", "Thai", "hexadecimal"])
def test_a_long_run_is_told_as_briefly_as_by_the_tokens_of_the_uncut_run(name):
    ours, library = trained(RUNS[name], 400), library_tokenizer(RUNS[name], 400)
    assert len(ours.encode(RUNS[name])) < 1.01 * len(library.encode(RUNS[name]).ids)


def test_a_saved_vocabulary_is_the_same_vocabulary(tmp_path):
    path = save_tokenizer(TRAINED, tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, BPETokenizer)
    assert (again.hash, again.tokens, again.specials) == (TRAINED.hash, TRAINED.tokens, TRAINED.specials)
    assert again.encode(PROSE) == TRAINED.encode(PROSE)
    assert build_tokenizer(TokenizerConfig(kind="file", path=str(path))).hash == TRAINED.hash
    assert tokenizer_from_dict(TRAINED.to_dict()).hash == TRAINED.hash


@pytest.mark.parametrize(("kind", "character"), [*((kind, " ") for kind in PATTERNS), ("bpe", "a"), ("o200k", "\n")])
def test_a_megabyte_of_one_character_is_encoded(kind, character):
    tokenizer = BPETokenizer(kind, PATTERNS[kind], TRAINED.tokens, TRAINED.specials)
    text = character * (1 << 20) + "x"
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_floods_of_blanks_are_cut_and_nothing_else(monkeypatch):
    monkeypatch.setattr(bpe, "MOST_BLANKS", 100)
    text = "a" * 300 + " " * 100 + "b" + "\n" * 250 + "c" + " " * 99
    assert [len(portion) for portion in bpe._few_blanks(text)] == [501, 100, 150]
    assert "".join(bpe._few_blanks(text)) == text
    assert list(bpe._few_blanks("")) == [""]
