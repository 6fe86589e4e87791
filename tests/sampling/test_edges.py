"""The front door at its edges: replays, searches in parts, criteria, ids and prompts that are none."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.sampling.loop.prompts import holds_stop
from minigpt.sampling.processors.bans import PrefixAllowed
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from table_model import LetterTokenizer, TableLM


def letters(**config) -> Sampler:
    model = TableLM(vocab_size=8, order=None, max_context=16, end_bias=0.5)
    return Sampler(
        model, LetterTokenizer(8), SamplingConfig(**{"seed": 1, "temperature": 1.0, "max_new_tokens": 20, **config})
    )


def test_a_replay_writes_one_text_whatever_the_settings_ask_for():
    plain = letters()
    expected = plain.replay(["ab", "cd"], ["ef", "b"])
    assert [one.text for one in expected] == ["ef", "b"]
    assert plain.replay(["ab", "cd"], ["ef", "b"], num_return_sequences=3) == expected
    searching = Sampler(plain.model, plain.tokenizer, dataclasses.replace(plain.config, num_beams=4, num_beam_groups=2))
    assert searching.replay(["ab", "cd"], ["ef", "b"]) == expected


def test_a_search_within_a_budget_finds_what_it_finds_at_once():
    sampler = letters()
    prompts = ["ab", "cdefg", "a", "cd"]
    asked = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": [0, 2, 3, 4], "max_new_tokens": [5, 6, 7, 8]}
    expected = sampler.generate(prompts, **asked)
    for budget in ({"max_rows": 6}, {"max_rows": 1}, {"max_batch_tokens": 30}):
        sampler.model.rows_read.clear()
        assert sampler.generate(prompts, **asked, **budget) == expected
        assert max(sampler.model.rows_read) <= max(3, budget.get("max_rows", 6))


def test_a_criterion_does_not_go_with_a_search():
    sampler = letters()
    sampler = Sampler(sampler.model, sampler.tokenizer, criteria=[lambda context: [None] * len(context.rows)])
    with pytest.raises(ConfigError, match="criteria do not work with num_beams"):
        sampler.generate("ab", num_beams=2)


def test_a_search_in_parts_tells_processors_the_prompts_own_numbers():
    sampler = letters()
    own = [PrefixAllowed(lambda number, ids: [1 + number])]
    sampler = Sampler(sampler.model, sampler.tokenizer, processors=own)
    for budget in ({}, {"max_rows": 2}, {"max_batch_tokens": 12}):
        found = sampler.generate(["a", "bcd", "ef"], num_beams=2, max_new_tokens=3, **budget)
        assert [each[0].text for each in found] == ["aaa", "bbb", "ccc"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_a_replay_of_what_mirostat_forbids_teaches_it_nothing(version: int, eta: float):
    sampler = letters()
    asked = {"mirostat": version, "mirostat_tau": 0.1, "mirostat_eta": eta, "ignore_eos": True}
    likely = sampler.generate("ab", temperature=0, max_new_tokens=6, ignore_eos=True)[0][0].ids
    unlikely = (likely[0] + 1) % 8
    done = sampler.replay("ab", [[unlikely, *likely]], **asked)[0]
    assert done.details[0].processed_log_prob == -math.inf, "what mirostat forbids"
    again = sampler.replay([*done.prompt_ids, unlikely], [likely], **asked)[0]
    assert [one.processed_log_prob for one in done.details[1:]] == pytest.approx(
        [one.processed_log_prob for one in again.details]
    )


def test_ids_that_only_the_model_has_are_refused_wherever_they_are_asked_for():
    sampler = Sampler(TableLM(vocab_size=9), LetterTokenizer(8), SamplingConfig(max_new_tokens=3, seed=1))
    for asked in ({"forced_bos_token_id": 8}, {"forced_eos_token_id": [2, 8]}):
        with pytest.raises(ConfigError, match=f"{next(iter(asked))} is .*8.*below the tokenizer's vocab_size 8"):
            sampler.generate("ab", **asked)
    with pytest.raises(ConfigError, match="continuation 0: token id 8"):
        sampler.replay("ab", [[8]])
    with pytest.raises(ConfigError, match="token id 8"):
        sampler.score([[1, 8]])
    insisting = Sampler(sampler.model, sampler.tokenizer, sampler.config, [PrefixAllowed(lambda number, ids: [8])])
    done = insisting.generate("ab")[0][0]
    assert (done.finish_reason, done.ids) == ("error", [])
    assert "AllowedVocabulary left no token" in done.error


@pytest.mark.parametrize("prompt", [5, None, {"a": 1}, [1.5], torch.tensor(3), b"ab", [b"ab"], [["a"]], [True]])
def test_what_is_no_prompt_is_named(prompt):
    sampler = letters()
    for ask in (sampler.generate, sampler.score, lambda given: sampler.replay("a", given)):
        with pytest.raises(ConfigError, match="expected a text"):
            ask(prompt)


@pytest.mark.parametrize("show", [-1, True, 1.5, None])
def test_how_much_work_to_show_is_a_whole_number(show):
    with pytest.raises(ConfigError, match="show_work is"):
        letters().generate("ab", show_work=show)


class Trimming(LetterTokenizer):
    """Words of a vocabulary that drops the space at the start of a text."""

    words = (".", " X", " y", "z")

    def decode(self, ids):
        return "".join(self.words[token] for token in ids).removeprefix(" ")


def test_a_stop_string_that_begins_with_a_space_is_found_at_once_behind_the_prompt():
    tokenizer = Trimming(4)
    assert holds_stop(tokenizer, [2, 3], [1], [" X"])
    assert holds_stop(tokenizer, [2, 3], [3] * 40 + [1], [" X"])
    assert not holds_stop(tokenizer, [2, 1], [3], [" X"]), "the prompt does not count"
    assert not holds_stop(tokenizer, [2, 1], [3], [])


def strong(name: str, value: float) -> dict:
    """A setting of that strength."""
    return {name: {"logit_bias": {1: value}, "sequence_bias": [[[1], value]]}.get(name, value)}


ADDED = ("logit_bias", "sequence_bias", "presence_penalty", "frequency_penalty")
MULTIPLIED = ("repetition_penalty", "encoder_repetition_penalty", "smoothing_factor")


@pytest.mark.parametrize("name", [*ADDED, *MULTIPLIED])
def test_a_strength_that_makes_logits_infinite_is_refused_when_it_is_checked_and_says_why(name):
    sampler = Sampler(TableLM(), LetterTokenizer(6))
    refused = [1e31, 3e38, 1e39, 1e308, *([-1e39] if name in ADDED else [1e-40] if "repetition" in name else [])]
    for value in refused:
        with pytest.raises(ConfigError, match=f"{name} is .*1e30 .*overflow float32") as error:
            sampler.generate("abab", max_new_tokens=4, **strong(name, value))
        assert "\n" not in str(error.value)
    taken = [1e30, *([-1e30] if name in ADDED else [1e-30])]
    for value in taken:
        (done,) = sampler.generate("abab", max_new_tokens=4, seed=1, **strong(name, value))[0]
        assert done.error is None and len(done.ids) in range(1, 5)


def test_minus_infinity_still_forbids():
    (done,) = Sampler(TableLM(), LetterTokenizer(6)).generate(
        "ab", max_new_tokens=30, seed=1, logit_bias={1: -math.inf}, ignore_eos=True
    )[0]
    assert len(done.ids) == 30 and 1 not in done.ids
