"""Bits a byte: the bytes of the text as it was given, whatever the tokenizer puts in front of it or makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

import minigpt
from minigpt.data.config import DataConfig
from minigpt.data.prepare import prepare
from minigpt.evaluation.loss import byte_lengths, bytes_per_token
from minigpt.evaluation.text import evaluate_run
from minigpt.sampling.sampler import Sampler
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.huggingface import HuggingFaceTokenizer
from minigpt.tokenizer.plain import ByteTokenizer
from tokenizer_files import sentencepiece
from toys import random_model, tiny_config, transformers_twin
from training_runs import run_and_read, tiny_run

NFKC = [normalizers.NFKC(), normalizers.Lowercase()]


def tokenizer_json(changes=()) -> str:
    made = sentencepiece()
    made.normalizer = normalizers.Sequence(
        [*changes, normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return made.to_str()


def sampler_of(content: str, eot: int | None = 2) -> Sampler:
    tokenizer = HuggingFaceTokenizer(content, eot)
    return Sampler(random_model(tiny_config("modern", vocab_size=tokenizer.vocab_size)), tokenizer)


@pytest.mark.parametrize(
    ("changes", "text", "given"),
    [
        ((), "the", 3),  # read as " the"
        ((), "the cat at", 10),
        ((), "\u2603", 3),  # three tokens, one per byte, and the space
        (NFKC, "\uff34\uff28\uff25", 9),  # full-width THE, read as " the"
        (NFKC, "\ufb01", 3),  # the ligature fi, read as two letters
        (NFKC, "the \u212b", 7),  # the Angstrom sign, three bytes for two
    ],
)
def test_a_score_counts_the_bytes_of_the_text_as_given(changes, text, given):
    (score,) = sampler_of(tokenizer_json(changes)).score(text)
    assert score.bytes == pytest.approx(given)
    assert score.bits_per_byte == pytest.approx(-score.total / math.log(2) / given)


def test_several_scores_and_ids_count_each_their_own():
    sampler = sampler_of(tokenizer_json())
    texts = ["the", [sampler.tokenizer.encode("the cat")][0], ""]
    assert [score.bytes for score in sampler.score(texts)] == pytest.approx([3, 7, 0])
    assert math.isnan(sampler.score("")[0].bits_per_byte)
    built_in = Sampler(random_model(tiny_config("modern", vocab_size=257)), ByteTokenizer())
    assert [score.bytes for score in built_in.score(["\u2603h", [104, 105]])] == [4, 2]


def test_without_an_end_of_text_the_first_token_has_no_share():
    (score,) = sampler_of(tokenizer_json(), eot=None).score("the at")  # " the", " ", "at": 6 bytes for 7 spelled
    assert score.log_probs[0] is None
    assert score.bytes == pytest.approx(6 * 3 / 7)


def write_documents(folder: Path, text: str, count: int = 150) -> Path:
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for _ in range(count)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("changes", "text", "size"), [((), "the at", 6), (NFKC, "\uff34h\uff25", 7)])
def test_an_evaluation_counts_the_bytes_of_the_documents_as_given(changes, text, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "model").mkdir()
    content = tokenizer_json(changes)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    vocab_size = HuggingFaceTokenizer(content).vocab_size
    transformers_twin(random_model(tiny_config("llama", vocab_size=vocab_size))).save_pretrained(folder)
    source = write_documents(tmp_path, text)
    data = DataConfig(source=str(source), folder=str(tmp_path / "data"))
    found, _ = evaluate_run(minigpt.load(folder), data)
    first = size * (4 / 7 if text == "the at" else 1)  # of " the" in " the at"; of all: nothing predicts it
    assert found.bytes == round(150 * size - first)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)
    part, _ = evaluate_run(minigpt.load(folder), data, limit_tokens=48)
    assert part.bytes / part.tokens == pytest.approx(found.bytes / found.tokens, rel=0.15)


def test_lengths_add_up_to_the_text_of_a_split_and_are_as_they_were_where_tokens_spell_it(tmp_path):
    (file := tmp_path / "tokenizer.json").write_text(tokenizer_json(NFKC), encoding="utf-8")
    source = write_documents(tmp_path, "\uff34h\uff25 cat")
    for config, exact in ((TokenizerConfig(kind="file", path=str(file)), False), (TokenizerConfig(kind="byte"), True)):
        corpus = prepare(DataConfig(source=str(source), folder=str(tmp_path / "data"), val_fraction=0.2), config)
        tokenizer = corpus.tokenizer
        plain = bytes_per_token(tokenizer.token_bytes(), tokenizer.vocab_size)
        for split, stream in (("train", corpus.train), ("val", corpus.val)):
            lengths = byte_lengths(corpus, split, tokenizer, tokenizer.vocab_size)
            ids = torch.from_numpy(stream.read([0], len(stream))[0])
            assert float(lengths[ids].sum()) == pytest.approx(corpus.counts[split]["bytes"])
            assert torch.equal(lengths, plain.double()) is exact


def test_training_tells_bits_a_byte_of_the_text_as_given(tmp_path):
    (file := tmp_path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    source = write_documents(tmp_path, "the at")
    changes = {"tokenizer__kind": "file", "tokenizer__path": str(file), "data__source": str(source)}
    _, rows = run_and_read(tiny_run(tmp_path, trainer__max_steps=2, eval__every=2, **changes))
    last = [row for row in rows if "val/bpb" in row][-1]
    corpus = prepare(
        DataConfig(source=str(source), folder=str(tmp_path / "data")), TokenizerConfig(kind="file", path=str(file))
    )
    tokens, size = len(corpus.val) - 1, corpus.counts["val"]["bytes"]
    assert size == 15 * 6
    predicted = round(size - 6 * 4 / 7)  # all but the first " the"
    assert last["val/bpb"] == pytest.approx(last["val/loss"] * tokens / math.log(2) / predicted, rel=1e-5)
