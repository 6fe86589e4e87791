"""Many prompts: completions as they end, in order, in batches that fit in memory."""

from __future__ import annotations

from itertools import count, islice

import pytest
import torch

from minigpt.errors import ConfigError, MemoryExceeded
from minigpt.model import device
from minigpt.model.fast import fast
from minigpt.sampling import sampler as sampler_module
from minigpt.sampling.loop import loop, room
from minigpt.sampling.loop.room import Room
from minigpt.sampling.processors.bans import PrefixAllowed
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from table_model import LetterTokenizer, TableLM
from toys import random_model, tiny_config

PROMPTS = ["ab", "c" * 9, "d", "ef", "a" * 30, "b"] * 5


def letters(**config) -> Sampler:
    model = TableLM(vocab_size=8, order=None, max_context=16, end_bias=0.5)
    return Sampler(
        model, LetterTokenizer(8), SamplingConfig(**{"seed": 1, "temperature": 1.0, "max_new_tokens": 12, **config})
    )


@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "seed": None}])
@pytest.mark.parametrize("window", [1, 7, 1024])
def test_what_is_iterated_is_what_is_generated(window, search, monkeypatch):
    monkeypatch.setattr(sampler_module, "WINDOW", window)
    sampler = letters(num_return_sequences=2, **search)
    expected = [done for samples in sampler.generate(PROMPTS) for done in samples]
    for given in (PROMPTS, iter(PROMPTS), tuple(PROMPTS)):
        found = list(sampler.iterate(given))
        assert found == expected
        places = [(done.prompt_index, done.sample_index) for done in found]
        assert places == [(prompt, sample) for prompt in range(len(PROMPTS)) for sample in range(2)]
    loose = list(sampler.iterate(PROMPTS, unordered=True, max_rows=4))
    assert sorted(loose, key=lambda done: (done.prompt_index, done.sample_index)) == expected


def test_a_completion_comes_when_it_ends_and_prompts_are_read_as_needed(monkeypatch):
    monkeypatch.setattr(sampler_module, "WINDOW", 4)
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield "abcd"[number % 4]

    done = list(islice(letters().iterate(endless()), 6))
    assert [one.prompt_index for one in done] == list(range(6))
    assert [one.seed for one in done] == list(range(1, 7))
    assert len(read) <= 12
    first = next(letters(ignore_eos=True).iterate(["a", "b", "c"], max_new_tokens=[9, 1, 5], unordered=True))
    assert first.prompt_index == 1, "the shortest ends first"


def test_a_mistake_is_told_at_the_call(monkeypatch):
    with pytest.raises(ConfigError, match="top_k is -1"):
        letters().iterate(["a"], top_k=-1)
    with pytest.raises(ConfigError, match="prompt 1 is 5"):
        letters().iterate(["a", 5])
    with pytest.raises(ConfigError, match="seed has 2 values for 3 prompts"):
        letters().iterate(["a", "b", "c"], seed=[1, 2])


def test_a_batch_has_no_more_rows_than_fit(monkeypatch):
    model = random_model(tiny_config("gpt2")).double()
    cost = Room(model).row_bytes(20)
    monkeypatch.setattr(room, "free_bytes", lambda device: int(cost * 4.5 / room.SHARE))
    assert Room(model).fits(4, 20) and not Room(model).fits(5, 20)
    assert Room(model).fits(1, 10**9), "one row is always tried"
    sizes = []

    class Noting(loop.Batch):
        def __init__(self, model, rows, *arguments):
            sizes.append(len(rows))
            super().__init__(model, rows, *arguments)

    monkeypatch.setattr(loop, "Batch", Noting)
    sampler = Sampler(model, LetterTokenizer(61), SamplingConfig(max_new_tokens=10, ignore_eos=True, seed=1))
    done = [one.ids for (one,) in sampler.generate([[1] * 10] * 10)]
    assert sizes == [4, 4, 2]
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    assert [one.ids for (one,) in sampler.generate([[1] * 10] * 10)] == done
    assert sizes[3:] == [10]


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: fast(model, 4)])
def test_a_rows_cost_is_at_least_its_cache(wrap):
    model = random_model(tiny_config("llama"))
    cache = model.new_cache(1, 24)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.keys, *cache.values))
    assert held < Room(wrap(model)).row_bytes(24) < 1000 * held


def test_a_batch_for_which_memory_runs_out_goes_on_in_smaller_ones(monkeypatch):
    model = TableLM(vocab_size=8, order=None, max_context=16, end_bias=0.5)
    small = letters()
    steps = []

    class Small(TableLM):
        """A model that runs out of memory with more than 5 rows, but not at once."""

        def next_logits(self, ids, cache, counts=None):
            steps.append(len(ids))
            if len(ids) > 5 and len(steps) % 4 == 0:
                raise torch.OutOfMemoryError("out of memory")
            return super().next_logits(ids, cache, counts)

    small.model = Small(vocab_size=8, order=None, max_context=16, end_bias=0.5)
    plenty = Sampler(model, small.tokenizer, small.config)
    assert small.generate(PROMPTS, num_return_sequences=2) == plenty.generate(PROMPTS, num_return_sequences=2)
    assert max(steps) > 5
    streamed = list(small.stream(PROMPTS))
    expected = list(plenty.stream(PROMPTS))
    assert sorted(streamed, key=lambda event: event.prompt) == sorted(expected, key=lambda event: event.prompt)


def test_a_row_that_does_not_fit_is_memory_exceeded_with_what_to_do(monkeypatch):
    class Tiny(TableLM):
        def next_logits(self, ids, cache, counts=None):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    sampler = letters()
    sampler.model = Tiny(vocab_size=8, order=None, max_context=16)
    for ask in (sampler.generate, lambda prompts: sampler.generate(prompts, num_beams=2)):
        with pytest.raises(MemoryExceeded, match=r"out of memory with 1 .*set a smaller max_rows") as raised:
            ask(["a"])
        assert raised.value.exit_code == 9


def test_free_memory_is_the_least_of_what_the_system_tells(monkeypatch):
    monkeypatch.setattr(device, "_available", lambda: 7)
    monkeypatch.setattr(device, "_left_in_group", lambda: None)
    monkeypatch.setattr(device, "_left_in_address_space", lambda: 5)
    assert device.free_bytes() == 5
    monkeypatch.setattr(device, "_left_in_address_space", lambda: None)
    assert device.free_bytes() == 7
    monkeypatch.setattr(device, "_available", lambda: None)
    assert device.free_bytes() is None


def test_a_prompt_far_longer_than_the_context_has_no_company_that_it_slows():
    sampler = letters(repetition_penalty=1.2)
    batches = loop.divide(
        [loop.Row(n, 0, 0, [1] * length, 5) for n, length in enumerate((3, 9, 1000, 12, 16))], sampler.model, None, None
    )
    assert [[row.prompt for row in batch] for batch in batches] == [[0, 1, 3, 4], [2]]


def test_a_prompt_longer_than_the_context_is_told_once(capsys):
    for _ in range(2):
        letters().generate(["a" * 17, "a" * 40])
    assert capsys.readouterr().err.count("a prompt is longer than the model's context of 16 tokens") <= 1


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
def test_processors_see_the_number_of_the_prompt_in_the_call(search, monkeypatch):
    monkeypatch.setattr(sampler_module, "WINDOW", 2)
    sampler = letters(seed=None)
    only = PrefixAllowed(lambda number, ids: [1 + number])
    sampler = Sampler(sampler.model, sampler.tokenizer, {"max_new_tokens": 2, "ignore_eos": True, **search}, only)
    found = [(done.prompt_index, done.ids) for done in sampler.iterate(["a"] * 5)]
    assert found == [(number, [1 + number] * 2) for number in range(5)]
    each = [5, 1, 4, 2, 3]
    found = [len(done.ids) for done in sampler.iterate(["a"] * 5, max_new_tokens=each)]
    assert found == each


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
def test_a_prompt_that_may_not_leave_the_context_is_an_error_of_its_own(search):
    sampler = letters(overflow="stop", num_return_sequences=2, **search)
    found = list(sampler.iterate(["ab", "a" * 17, "c"]))
    assert [done.prompt_index for done in found] == [0, 0, 1, 1, 2, 2]
    assert [done.finish_reason for done in found[2:4]] == ["error"] * 2
    assert found[2].error == "the prompt has 17 tokens, but the model's context is 16"
    fine = [done for samples in sampler.generate(["ab", "c"], seed=[1, 3]) for done in samples]
    assert [*found[:2], *found[4:]] == fine
    with pytest.raises(ConfigError, match="prompt 1 has 17 tokens"):
        sampler.generate(["ab", "a" * 17, "c"])
