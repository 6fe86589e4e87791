from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from table_model import ByteDecoder, ByteTokenizer, FixedLM, LetterTokenizer, ScriptLM, TableLM
from toys import random_model, tiny_config

END = 256


def scripted(text: str | bytes, prompt: str = ">", **config) -> Sampler:
    """Writes the text after a one-byte prompt, then end-of-text."""
    data = text.encode() if isinstance(text, str) else text
    script = [*prompt.encode(), *data, END]
    return Sampler(ScriptLM(script), ByteTokenizer(), SamplingConfig(**{"temperature": 0.0, **config}))


def letters(**config) -> Sampler:
    model = TableLM(vocab_size=8, order=None, max_context=16, end_bias=0.5)
    return Sampler(
        model, LetterTokenizer(8), SamplingConfig(**{"seed": 1, "temperature": 1.0, "max_new_tokens": 20, **config})
    )


def test_a_completion_holds_what_was_written():
    ((completion,),) = scripted("Hello 🙂, 世界").generate(">")
    assert completion.text == "Hello 🙂, 世界"
    assert completion.ids == [*"Hello 🙂, 世界".encode(), END]
    assert completion.prompt_ids == [ord(">")]
    assert completion.finish_reason == "end"
    assert completion.usage == (1, len(completion.ids))
    assert len(completion.log_probs) == len(completion.ids)
    assert completion.error is None


@pytest.mark.parametrize(
    ("text", "stop", "cut", "kept"),
    [
        ("one\nQ: two", ["\nQ:"], "one", "one\nQ:"),
        ("5556", ["556"], "5", "5556"),
        ("a café au lait", ["fé"], "a ca", "a café"),
        ("🙂🙃", ["🙃"], "🙂", "🙂🙃"),
        ("abc", ["bc", "b"], "a", "ab"),
    ],
)
def test_stop_strings_cut_the_text(text, stop, cut, kept):
    ((completion,),) = scripted(text, stop=stop).generate(">")
    assert (completion.text, completion.finish_reason) == (cut, "stop")
    ((completion,),) = scripted(text, stop=stop, include_stop=True).generate(">")
    assert (completion.text, completion.finish_reason) == (kept, "stop")
    assert completion.ids == list(kept.encode())


def test_a_stop_string_that_begins_in_the_prompt_does_not_count():
    ((completion,),) = scripted("> b", prompt="a>", stop=["a>", ">>"]).generate("a>")
    assert (completion.text, completion.finish_reason) == ("> b", "end")


def test_what_was_held_back_comes_out_at_the_end():
    events = list(scripted("the EN", stop=["END"]).stream(">"))
    assert "".join(event.text for event in events) == "the EN"
    assert events[-1].text == "EN"
    ((completion,),) = scripted("the END", stop=["END"]).generate(">", max_new_tokens=6)
    assert (completion.text, completion.finish_reason) == ("the EN", "length")


def test_half_a_character_at_the_end_becomes_a_replacement():
    ((completion,),) = scripted("né").generate(">", max_new_tokens=2)
    assert completion.text == "n\ufffd"


@pytest.mark.parametrize("stop", [[], ["b"], ["gc", "aa"]])
def test_generating_equals_collecting_the_stream(stop):
    sampler = letters(stop=stop, num_return_sequences=3)
    prompts = ["ab", "c", "abcdefg", "ab"]
    texts: dict = {}
    events = list(sampler.stream(prompts))
    for event in events:
        texts.setdefault((event.prompt, event.sample), []).append(event)
    for i, samples in enumerate(sampler.generate(prompts)):
        assert len(samples) == 3
        for j, completion in enumerate(samples):
            mine = texts[i, j]
            assert completion.text == "".join(event.text for event in mine)
            assert completion.ids == [event.token for event in mine if event.token is not None]
            assert completion.finish_reason == mine[-1].finish_reason
            assert all(event.finish_reason is None for event in mine[:-1])


def test_one_seed_gives_a_prompt_the_same_text_in_any_company():
    sampler = letters()
    prompts = ["ab", "c", "abcdefg"]
    together = sampler.generate(prompts, seed=[1, 1, 1])
    assert [sampler.generate(prompt)[0] for prompt in prompts] == together
    assert sampler.generate(prompts[::-1], seed=[1, 1, 1]) == together[::-1]
    assert {completion.seed for (completion,) in together} == {1}


def test_one_seed_for_several_prompts_is_counted_up_so_that_no_two_draw_the_same_numbers():
    sampler = letters(seed=2**64 - 2)
    together = sampler.generate(["ab"] * 4, num_return_sequences=2)
    assert [[done.seed for done in samples] for samples in together] == [
        [2**64 - 2] * 2,
        [2**64 - 1] * 2,
        [0] * 2,
        [1] * 2,
    ]
    for samples in together:
        assert sampler.generate("ab", num_return_sequences=2, seed=samples[0].seed) == [samples]
    firsts = [done.ids[0] for (done,) in sampler.generate(["ab"] * 200, seed=1, max_new_tokens=1, temperature=1e9)]
    assert len(set(firsts)) == 8, "one seed for all would draw one token 200 times"


def test_seeds_are_reported_and_repeat_the_text():
    sampler = letters(seed=None)
    first = sampler.generate(["ab", "ab"])
    seeds = [completion.seed for (completion,) in first]
    assert seeds[0] != seeds[1]
    assert sampler.generate(["ab", "ab"], seed=seeds) == first
    assert sampler.generate("ab", seed=seeds[1])[0] == first[1]


def test_ids_and_text_are_the_same_prompt_in_any_form():
    sampler = letters()
    expected = sampler.generate("abc")
    forms: list = [[1, 2, 3], (1, 2, 3), ["abc"], [[1, 2, 3]], np.array([1, 2, 3]), torch.tensor([[1, 2, 3]])]
    forms += [range(1, 4), (i for i in (1, 2, 3)), list(torch.tensor([1, 2, 3])), [np.int8(1), 2, torch.tensor(3)]]
    forms += [iter(["abc"]), (range(1, 4),), [iter([1, 2, 3])], np.array([[1, 2, 3]], dtype=np.uint16)]
    for prompt in forms:
        assert sampler.generate(prompt) == expected
    assert sampler.generate(["abc", [1, 2, 3]], seed=[1, 1]) == expected * 2
    assert sampler.generate([]) == []
    assert list(sampler.stream([])) == []
    empty = sampler.generate([[]])
    for prompt in (np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64), [torch.tensor([])]):
        assert sampler.generate(prompt) == empty, "one prompt without ids"


def test_settings_for_each_prompt_are_those_of_single_calls():
    sampler = letters()
    prompts = ["ab", "cd", "efg"]
    each = {"temperature": [0.0, 0.7, 2.0], "top_k": [None, 3, 0], "top_p": [0.9, None, 1.0], "seed": [5, 6, None]}
    together = sampler.generate(prompts, **each)
    for i, prompt in enumerate(prompts):
        own = {name: values[i] for name, values in each.items()}
        own["seed"] = together[i][0].seed
        assert sampler.generate(prompt, **own)[0] == together[i]
    assert sampler.generate(prompts, temperature=torch.tensor([0.0, 0.5, 1.0]))[2] == sampler.generate("efg", seed=3)[0]


def test_neutral_settings_change_nothing():
    sampler = letters()
    expected = sampler.generate("ab")
    for neutral in ({"top_k": 0}, {"top_k": 8}, {"top_k": 100.0}, {"top_p": 1.0}, {"top_p": 1}, {"temperature": 1}):
        assert sampler.generate("ab", **neutral) == expected


def test_an_empty_prompt_starts_from_the_end_of_text_token():
    ((completion,),) = Sampler(ScriptLM([END, *b"Hi", END]), ByteTokenizer(), SamplingConfig(temperature=0)).generate(
        ""
    )
    assert (completion.prompt_ids, completion.text) == ([END], "Hi")


def test_an_empty_prompt_starts_from_a_newline_where_there_is_no_end_of_text():
    sampler = Sampler(ScriptLM([10, *b"Hi"]), ByteTokenizer(eot=None), SamplingConfig(temperature=0, max_new_tokens=2))
    for prompt in ("", [""], [[]]):
        ((completion,),) = sampler.generate(prompt)
        assert (completion.prompt_ids, completion.text) == ([10], "Hi")


def test_an_empty_prompt_without_any_start_is_an_error():
    class NoNewline(LetterTokenizer):
        eot = None

        def encode(self, text):
            if "\n" in text:
                raise DataError("no newline in the vocabulary")
            return super().encode(text)

    with pytest.raises(ConfigError, match="prompt is empty"):
        Sampler(TableLM(), NoNewline(6)).generate("")


def test_no_new_tokens_give_an_empty_completion():
    ((completion,), (_other,)) = letters().generate(["ab", "c"], max_new_tokens=0)
    assert (completion.text, completion.ids, completion.finish_reason) == ("", [], "length")
    assert completion.usage == (2, 0)


def test_ids_beyond_the_tokenizer_are_never_written():
    model = FixedLM([0.0, 0.0, 0.0, 50.0, 60.0])
    for temperature in (0.0, 1.0, 5.0):
        sampler = Sampler(model, LetterTokenizer(3), SamplingConfig(ignore_eos=True, temperature=temperature))
        ((completion,),) = sampler.generate("a", max_new_tokens=50)
        assert set(completion.ids) <= {0, 1, 2}
    with pytest.raises(ConfigError, match="token id 3 at position 1 is outside the vocabulary of 3 tokens"):
        sampler.generate([1, 3])


def test_end_tokens_can_be_chosen_and_ignored():
    sampler = letters(max_new_tokens=60)
    ((ended,),) = sampler.generate("ab", eos_token_id=[3, 5])
    assert ended.finish_reason == "end"
    assert ended.ids[-1] in (3, 5)
    assert not {3, 5} & set(ended.ids[:-1])
    ((ignoring,),) = sampler.generate("ab", ignore_eos=True)
    assert len(ignoring.ids) == 60
    assert "." in ignoring.text
    with pytest.raises(ConfigError, match="eos_token_id is 9"):
        sampler.generate("ab", eos_token_id=9)


def test_special_tokens_in_a_prompt_are_ordinary_text():
    sampler = Sampler(ScriptLM([*b"<|endoftext|>", *b"x", END]), ByteTokenizer(), SamplingConfig(temperature=0))
    ((completion,),) = sampler.generate("<|endoftext|>")
    assert completion.prompt_ids == list(b"<|endoftext|>")
    assert completion.text == "x"


class SpaceDroppingTokenizer(ByteTokenizer):
    """Drops a space at the start of a text, as vocabularies made with sentencepiece do."""

    class Decoder(ByteDecoder):
        started = False

        def push(self, token):
            text = super().push(token)
            text, self.started = text if self.started else text.removeprefix(" "), True
            return text

    def stream_decoder(self):
        return self.Decoder()


def test_a_continuation_keeps_the_space_that_a_text_would_lose_at_its_start():
    sampler = Sampler(ScriptLM([*b"Once", *b" upon", END]), SpaceDroppingTokenizer(), SamplingConfig(temperature=0))
    assert sampler.generate("Once")[0][0].text == " upon"
    opening = Sampler(ScriptLM([END, *b" upon", END]), SpaceDroppingTokenizer(), SamplingConfig(temperature=0))
    assert opening.generate("")[0][0].text == "upon"


def test_half_a_character_in_the_prompt_does_not_reach_the_text():
    sampler = Sampler(ScriptLM([0xE2, *b"abc", END]), ByteTokenizer(), SamplingConfig(temperature=0))
    assert sampler.generate([0xE2])[0][0].text == "abc"


def test_processors_run_before_the_shaping_and_also_for_greedy_rows():
    def no_b(context, logits):
        logits[:, 2] = -torch.inf
        return logits

    model = TableLM(vocab_size=6, order=None)
    sampler = Sampler(model, LetterTokenizer(6), SamplingConfig(max_new_tokens=60, ignore_eos=True), processors=[no_b])
    for temperature in (0.0, 1.0):
        assert "b" not in sampler.generate("a", temperature=temperature)[0][0].text
    plain = Sampler(model, LetterTokenizer(6), SamplingConfig(max_new_tokens=60, ignore_eos=True, temperature=1.0))
    assert "b" in plain.generate("a", seed=1)[0][0].text


def test_an_error_in_one_sample_is_told_in_its_completion():
    def forbid_all_after_c(context, logits):
        logits[context.ids[:, 0] == 3] = -torch.inf
        return logits

    good, (bad,) = Sampler(TableLM(), LetterTokenizer(6), processors=[forbid_all_after_c]).generate(["ab", "c"], seed=1)
    assert bad.finish_reason == "error"
    assert "forbid_all_after_c" in bad.error
    assert bad.ids == []
    assert good == Sampler(TableLM(), LetterTokenizer(6)).generate("ab", seed=1)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"temprature": 1}, r"unknown field 'temprature'; did you mean 'temperature'\?"),
        ({"num_beans": 4}, "unknown field 'num_beans'; did you mean 'num_beams'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": [0.5]}, "temperature has 1 values for 2 prompts"),
        ({"temperature": [0.5, -2]}, "temperature is -2"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": ""}, r"stop is \[''\]"),
        ({"stop": [""]}, r"stop is \[''\]"),
        ({"overflow": "wrap"}, "overflow is 'wrap'; expected 'slide' or 'stop'"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_anything_runs(overrides, message):
    with pytest.raises(ConfigError, match=message):
        letters().stream(["ab", "c"], **overrides)


@pytest.mark.parametrize("prompt", [[1.5], ["ab", None], [["ab"]], [[1, "b"]]])
def test_what_is_no_prompt_is_an_error(prompt):
    with pytest.raises(ConfigError, match="expected a text or a list of token ids"):
        letters().stream(prompt)


def test_a_wrong_config_is_an_error_at_once():
    with pytest.raises(ConfigError, match="top_p is 2"):
        Sampler(TableLM(), LetterTokenizer(6), SamplingConfig(top_p=2))


def test_numpy_numbers_are_numbers():
    sampler = letters()
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint32(9), "max_new_tokens": np.int32(5)}
    plain = {"temperature": 0.5, "top_k": 3, "seed": 9, "max_new_tokens": 5}
    assert sampler.generate("ab", **given) == sampler.generate("ab", **plain)


def test_a_long_text_and_a_long_prompt_slide_alike_through_a_gpt():
    model = random_model(tiny_config("gpt2", vocab_size=257, block_size=16)).double()
    sampler = Sampler(model, ByteTokenizer(), SamplingConfig(seed=3, temperature=0.9, top_p=0.95, ignore_eos=True))
    ((whole,),) = sampler.generate(list(b"prompt"), max_new_tokens=40)
    ((rest,),) = sampler.generate(whole.prompt_ids + whole.ids[:25], max_new_tokens=15)
    assert rest.ids == whole.ids[25:]


def test_the_config_survives_generation_config_json():
    for config in (
        SamplingConfig(),
        SamplingConfig(temperature=0.0, stop=["a", "b"], eos_token_id=[1, 2], overflow="stop", include_stop=True),
        SamplingConfig(max_new_tokens=0, top_k=5, top_p=0.0, num_return_sequences=4, seed=0, ignore_eos=True),
    ):
        assert SamplingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_config_is_read_by_transformers_and_its_own_is_read_here():
    from transformers import GenerationConfig

    theirs = GenerationConfig(
        **SamplingConfig(temperature=0.7, top_k=9, top_p=0.8, stop=["x"], max_new_tokens=7).to_dict()
    )
    assert (theirs.do_sample, theirs.temperature, theirs.top_k, theirs.top_p) == (True, 0.7, 9, 0.8)
    assert (theirs.stop_strings, theirs.max_new_tokens) == (["x"], 7)
    assert GenerationConfig(**SamplingConfig(temperature=0).to_dict()).do_sample is False
    record = {"bos_token_id": 5, "eos_token_id": [5, 6], "do_sample": False, "temperature": 0.6, "top_p": None}
    config = SamplingConfig.from_dict({**record, "stop_strings": "x", "transformers_version": "5.0"})
    assert config == SamplingConfig(temperature=0.0, eos_token_id=[5, 6], stop=["x"])
    with pytest.raises(ConfigError, match="top_p is 7"):
        SamplingConfig.from_dict({"top_p": 7})


def test_the_config_loads_neither_torch_nor_numpy():
    code = "import sys, minigpt.sampling.settings.config; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
