"""Special tokens: put in front, read in a prompt on request, left out of the text. transformers is asked."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minigpt.errors import ConfigError
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.tokenizer.given import as_tokenizer
from minigpt.tokenizer.huggingface import from_engine
from minigpt.tokenizer.plain import ByteTokenizer
from table_model import ScriptLM
from tokenizer_files import byte_level, gemma, metaspace, sentencepiece
from toys import random_model, tiny_config, transformers_twin

MAKERS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "gemma": gemma, "metaspace": metaspace}
TEXTS = ["the cat", "", "<s>the</s> cat", "</s>", "<s> the <s>", "a </s>b", "ž<s>"]


def theirs(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=MAKERS[kind](), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_tokenizer_of_transformers_is_used_as_it_is(kind):
    own = theirs(kind)
    tokenizer = as_tokenizer(own)
    assert tokenizer.eot == own.eos_token_id
    for text in TEXTS:
        assert tokenizer.prompt_ids(text, parse_special=True) == own.encode(text)
        assert tokenizer.prompt_ids(text, False, True) == own.encode(text, add_special_tokens=False)
        if "<" not in text:
            assert tokenizer.prompt_ids(text) == own.encode(text)
    assert from_engine(own.backend_tokenizer).encode("the cat") == tokenizer.encode("the cat")


@pytest.mark.parametrize("add", [True, False])
def test_a_prompt_continues_as_in_transformers_with_and_without_the_beginning_token(add):
    own = theirs("byte_level")
    model = random_model(tiny_config("llama", vocab_size=len(own), block_size=64))
    twin = transformers_twin(model)
    sampler = Sampler(model, own, {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True})
    for text in ("the cat", "<s>the</s> cat"):
        ids = own.encode(text, add_special_tokens=add, return_tensors="pt")
        (expected,) = twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )
        done = sampler.generate(text, add_special_tokens=add, parse_special=True)[0][0]
        assert [*done.prompt_ids, *done.ids] == expected.tolist()
        hidden = own.decode(expected, skip_special_tokens=True)
        assert hidden.endswith(done.text)


def scripted(*ids: int, **config) -> Sampler:
    return Sampler(ScriptLM([ord(">"), *ids, 256]), ByteTokenizer(), SamplingConfig(temperature=0, **config))


def test_special_tokens_are_left_out_of_the_text_and_shown_on_request():
    text = "<|endoftext|>"
    ids = [*b"caf\xc3", 256, *b"\xa9!"]
    for ask in ({}, {"num_beams": 2}):
        done = scripted(*ids, ignore_eos=True, max_new_tokens=8).generate(">", **ask)[0][0]
        assert (done.ids, done.text) == ([*ids, 256], "café!"), "a character goes on after a token that is left out"
        done = scripted(*ids, ignore_eos=True, max_new_tokens=8, skip_special_tokens=False).generate(">", **ask)[0][0]
        assert done.text == f"caf\ufffd{text}\ufffd!{text}"
    events = list(scripted(*ids, ignore_eos=True, max_new_tokens=8).stream(">"))
    assert "".join(event.text for event in events) == "café!"


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
def test_a_special_token_that_is_left_out_still_is_a_stop_string(search):
    sampler = scripted(*b"ab", 256, *b"cd", ignore_eos=True, max_new_tokens=9)
    done = sampler.generate(">", stop="endoftext", **search)[0][0]
    assert (done.text, done.finish_reason) == ("ab", "stop")


def test_an_empty_prompt_and_a_score_begin_as_transformers_does():
    own = theirs("byte_level")
    model = random_model(tiny_config("llama", vocab_size=len(own)))
    sampler = Sampler(model, own)
    assert sampler.generate("", max_new_tokens=1)[0][0].prompt_ids == own.encode("") == [0]
    (score,) = sampler.score("the cat")
    ids = own.encode("the cat", return_tensors="pt")
    with torch.no_grad():
        expected = transformers_twin(model)(ids).logits[0].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    assert score.ids == ids[0].tolist()
    torch.testing.assert_close(torch.tensor(score.log_probs[1:]), expected, rtol=1e-5, atol=1e-5)
    assert score.log_probs[0] is None


def test_objects_that_are_not_what_was_meant_are_one_line():
    twin = transformers_twin(random_model(tiny_config("gpt2")))
    with pytest.raises(ConfigError, match=r"a model of transformers; save it with save_pretrained\(FOLDER\)"):
        Sampler(twin, ByteTokenizer())
    with pytest.raises(ConfigError, match="no tokenizer; give Sampler"):
        Sampler(random_model(tiny_config("gpt2")))
    with pytest.raises(ConfigError, match=r"object has no vocab_size, max_context, new_cache, next_logits; expected"):
        Sampler(object(), ByteTokenizer())
    with pytest.raises(ConfigError, match=r"tokenizer: object has no encode"):
        Sampler(random_model(tiny_config("gpt2")), object())


def test_processors_of_transformers_work_as_there():
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

    model = random_model(tiny_config("gpt2", vocab_size=257)).double()
    prompts = ["the cat", "a", "once upon"]
    settings = {"temperature": 1.0, "max_new_tokens": 9, "seed": [1, 2, 3], "ignore_eos": True}
    ours = Sampler(model, ByteTokenizer()).generate(prompts, repetition_penalty=1.8, top_k=4, **settings)
    penalty, top = RepetitionPenaltyLogitsProcessor(1.8), TopKLogitsWarper(4)
    for given in ([penalty, top], LogitsProcessorList([penalty, top])):
        assert Sampler(model, ByteTokenizer(), processors=given).generate(prompts, **settings) == ours
    alone = Sampler(model, ByteTokenizer(), processors=penalty).generate(prompts, **settings)
    assert alone == Sampler(model, ByteTokenizer()).generate(prompts, repetition_penalty=1.8, **settings)
    assert alone != ours
