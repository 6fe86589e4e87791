"""A tokenizer of the caller's with encode, decode and vocab_size alone, at every door: as the built-in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.checkpoint.saving import save_checkpoint
from minigpt.errors import ConfigError, DataError
from minigpt.internals.study import Study
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.scoring import score_ids
from minigpt.tokenizer.given import GivenTokenizer, as_tokenizer
from minigpt.tokenizer.plain import ByteTokenizer
from toys import random_model, tiny_config


class Minimal:
    """UTF-8 bytes, and no more than must be."""

    vocab_size = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """Some words; ids 3 and 4 are unused."""

    vocab_size, words = 5, ("the", "cat", "sat")

    def encode(self, text):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[id] for id in ids)


MODEL = random_model(tiny_config("modern", vocab_size=257))
SAME = {"max_new_tokens": 40, "seed": 5, "temperature": 1.3, "suppress_tokens": [256], "ignore_eos": True}
SETTINGS = {
    "plain": {},
    "stop": {"stop": ["a", "e", "("]},
    "filters": {"top_p": 0.9, "top_h": 0.8, "repetition_penalty": 1.2},
    "words": {"bad_words": ["e"], "dry_multiplier": 0.8, "dry_allowed_length": 1},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6},
    "forced": {"num_beams": 3, "force_words": ["é"], "max_new_tokens": 6},
    "likely": {"top_logprobs": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_writes_what_the_built_in_one_writes(name):
    settings = {**SAME, **SETTINGS[name]}
    prompts = ["h\u00e9 l", "\u65e5\u672c"]
    mine, built_in = (Sampler(MODEL, t).generate(prompts, **settings) for t in (Minimal(), ByteTokenizer()))
    assert [[done.ids for done in each] for each in mine] == [[done.ids for done in each] for each in built_in]
    if name not in ("stop", "words"):  # the last bytes of a character may be cut off
        assert [[done.text for done in each] for each in mine] == [[done.text for done in each] for each in built_in]


def test_a_stream_joined_is_the_text_decoded():
    events = list(Sampler(MODEL, Minimal()).stream("\u65e5", **SAME))
    ids = [event.token for event in events if event.token is not None]
    whole = Minimal().decode([*"\u65e5".encode(), *ids])
    assert "".join(event.text for event in events) == whole[1:]


def test_an_empty_prompt_begins_with_a_newline_and_a_score_with_the_second_token():
    sampler = Sampler(MODEL, Minimal())
    assert sampler.generate("", **SAME)[0][0].prompt_ids == [10]
    (score,) = sampler.score("abc")
    assert score.ids == [97, 98, 99] and score.log_probs == score_ids(MODEL, [[97, 98, 99]])[0].log_probs
    assert sampler.replay("ab", "c")[0].ids == [99]
    with pytest.raises(ConfigError, match="neither an end-of-text token nor a newline"):
        Sampler(random_model(tiny_config("gpt2", vocab_size=5)), NoNewline()).generate("")


class NoNewline(Words):
    def encode(self, text):
        return [{"the": 0}[text]] if text else []


def test_a_study_of_it_tells_what_the_built_in_one_does():
    mine, built_in = Study.of(MODEL, Minimal()), Study.of(MODEL, ByteTokenizer())
    assert mine.tokens("the") == built_in.tokens("the") == ["t", "h", "e"]
    assert mine.loss("the cat") == built_in.loss("the cat")
    page = mine.report("h\u00e9").data
    assert [token["s"] for token in page["tokens"]] == ["h", "<EF BF BD>", "<EF BF BD>"], "no more is known of a byte"
    assert page["lens"] and mine.report("the cat").html()
    assert np.allclose(mine.logit_lens("the cat").values, built_in.logit_lens("the cat").values)
    assert mine.heads().best("induction")
    completion, _ = mine.generate("the", max_new_tokens=3, seed=1)
    assert len(completion.ids) == 3
    assert mine.top_contexts(("post", 0), text="the cat sat on the mat").values.shape[1] == 10


def test_what_is_there_is_used_and_what_is_not_has_a_default():
    given = as_tokenizer(Words())
    assert isinstance(given, GivenTokenizer) and as_tokenizer(given) is given
    assert (given.kind, given.vocab_size, given.eot, given.specials) == ("Words", 5, None, {})
    assert given.pieces == given.token_bytes() == [b"the", b"cat", b"sat", b"", b""]
    assert given.words == Words.words, "what it has beside the protocol is still there"
    assert as_tokenizer(ByteTokenizer()).eot == 256

    class Ended(Words):
        kind, eot = "mine", 2

    ended = as_tokenizer(Ended())
    assert (ended.kind, ended.eot) == ("mine", 2) and ended.token_bytes()[2] == b""
    (done,) = Sampler(random_model(tiny_config("gpt2", vocab_size=5)), Ended()).generate(
        "the cat", allowed_token_ids=[2]
    )
    assert (done[0].finish_reason, done[0].text) == ("end", "")


def test_what_it_cannot_do_is_told_in_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="tokenizer: object has no encode, decode, vocab_size; it needs"):
        Sampler(MODEL, object())
    with pytest.raises(ConfigError, match="tokenizer: object has no"):
        Study.of(MODEL, object())
    with pytest.raises(DataError, match="the tokenizer Words cannot encode 'the dog'"):
        Sampler(random_model(tiny_config("gpt2", vocab_size=5)), Words()).generate("the dog")
    with pytest.raises(ConfigError, match="Minimal has no to_dict"):
        save_checkpoint(tmp_path / "step-00000001", MODEL, as_tokenizer(Minimal()))
    assert not list(tmp_path.iterdir())
    assert torch.equal(Study.of(MODEL, Words()).ids("the cat"), torch.tensor([[0, 1]]))


def test_what_its_protocol_holds_beyond_that_is_used():
    class Begun(Minimal):
        prefix_ids, specials = (7, 8), None

        def vocab_size(self):  # as SentencePiece has it
            return 250

        def __len__(self):  # as transformers counts added tokens
            return 256

    tokenizer = as_tokenizer(Begun())
    assert tokenizer.vocab_size == 256
    assert tokenizer.prompt_ids("ab") == [7, 8, 97, 98]
    assert tokenizer.token_bytes()[97] == b"a"
    [score] = Sampler(MODEL, Begun()).score("ab")
    assert score.ids == [7, 8, 97, 98]
    assert [value is None for value in score.log_probs] == [True, True, False, False]  # the prefix is given
    assert Sampler(MODEL, Begun()).score([[7, 8, 97, 98]])[0].log_probs == score.log_probs


def test_a_text_that_begins_with_the_end_of_text_is_scored_after_one():
    sampler = Sampler(MODEL, ByteTokenizer())
    assert sampler.score([[256, 97]])[0].ids == sampler.score([[97]])[0].ids == [256, 97]


@pytest.mark.parametrize("size", [None, "many"])
def test_a_vocabulary_without_a_size_is_refused(size):
    class Odd(Minimal):
        vocab_size = size

    with pytest.raises(ConfigError, match=r"vocab_size of Odd is .*; expected a number"):
        as_tokenizer(Odd())
