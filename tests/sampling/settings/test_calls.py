"""The settings of a call: one object, one per prompt, other programs' names, and settings without effect."""

from __future__ import annotations

import dataclasses

import pytest

from minigpt.errors import ConfigError
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.calls import groups, settings_of
from minigpt.sampling.settings.config import FIELDS, SamplingConfig
from minigpt.sampling.settings.conflicts import switched_on
from minigpt.sampling.settings.names import NAMES, TAKEN
from minigpt.sampling.settings.needs import NEEDS, without_effect
from table_model import LetterTokenizer, TableLM


def letters(**config) -> Sampler:
    model = TableLM(vocab_size=8, order=None, max_context=16, end_bias=0.5)
    return Sampler(
        model, LetterTokenizer(8), SamplingConfig(**{"seed": 1, "temperature": 1.0, "max_new_tokens": 12, **config})
    )


OWN = [
    SamplingConfig(seed=3, temperature=0.5, max_new_tokens=9, stop=["a"]),
    SamplingConfig(seed=3, temperature=1.5, max_new_tokens=4, logit_bias={3: 4.0}),
    SamplingConfig(seed=8, top_k=2, max_new_tokens=12, eos_token_id=[2, 3]),
    SamplingConfig(seed=9, mirostat=2, max_new_tokens=12, ignore_eos=True, num_return_sequences=2),
    SamplingConfig(num_beams=3, num_return_sequences=2, max_new_tokens=5),
    SamplingConfig(seed=5, temperature=0.0, max_new_tokens=7, bad_words_ids=[[2]], repetition_penalty=1.5),
]


def test_a_list_of_settings_gives_each_prompt_what_its_own_sampler_gives():
    prompts = ["ab", "c", "dd", "e", "fa", "b"]
    together = letters(top_p=0.5).generate(prompts, OWN)
    for prompt, config, samples in zip(prompts, OWN, together, strict=True):
        sampler = letters()
        assert samples == Sampler(sampler.model, sampler.tokenizer, config).generate(prompt)[0]
    assert letters().generate(prompts[::-1], OWN[::-1]) == together[::-1]
    assert list(letters().iterate(prompts, OWN)) == [done for samples in together for done in samples]
    streamed = [event for event in letters().stream(prompts[:4], OWN[:4]) if event.finish_reason]
    assert sorted({event.prompt for event in streamed}) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="config has 6 values for 2 prompts; give one per prompt"):
        letters().generate(["a", "b"], OWN)
    with pytest.raises(ConfigError, match=r"num_beams is 3.*cannot be streamed"):
        letters().stream(prompts, OWN)


def test_a_settings_object_replaces_the_samplers_and_a_dict_only_its_fields():
    sampler, config = letters(top_k=2), SamplingConfig(seed=7, temperature=1.7, max_new_tokens=6)
    assert sampler.generate("ab", config) == letters().generate("ab", seed=7, temperature=1.7, max_new_tokens=6)
    assert sampler.generate("ab", {"seed": 7}) == sampler.generate("ab", seed=7)
    assert sampler.generate("ab", config, seed=2) == sampler.generate("ab", dataclasses.replace(config, seed=2))
    assert sampler.generate(["ab", "c"], [{"seed": 7}, config])[0] == sampler.generate("ab", seed=7)[0]
    with pytest.raises(ConfigError, match="config is 3; expected a SamplingConfig, or a dict"):
        sampler.generate("ab", 3)
    with pytest.raises(ConfigError, match="unknown field 'temperatur'; did you mean 'temperature'"):
        sampler.generate("ab", {"temperatur": 1})


def test_a_generation_config_of_transformers_is_a_settings_object():
    from transformers import GenerationConfig

    ours = {"temperature": 0, "max_new_tokens": 3, "repetition_penalty": 1.3}
    expected = letters().generate("ab", **ours)[0][0].ids
    for asked in ({"do_sample": False}, {}):
        theirs = GenerationConfig(**asked, max_new_tokens=3, repetition_penalty=1.3)
        assert letters().generate("ab", theirs)[0][0].ids == expected


def test_equal_settings_have_equal_hashes():
    for config in OWN:
        assert hash(config) == hash(dataclasses.replace(config))
    assert hash(SamplingConfig(top_p=1)) == hash(SamplingConfig(top_p=1.0))
    assert len({*OWN, *map(dataclasses.replace, OWN)}) == len(OWN)


def test_prompts_that_differ_in_their_own_fields_alone_are_generated_together():
    call = settings_of(SamplingConfig(), 4, None, {"temperature": [0.0, 1.0, 0.5, 2.0], "stop": [["a"], [], ["b"], []]})
    assert groups(call.configs) == [[0, 1, 2, 3]]
    assert groups([OWN[0], OWN[2], OWN[0], OWN[3], OWN[2]]) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"stop_strings": "x"}, {"stop": ["x"]}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": True}, {}),
        ({"n": 3}, {"num_return_sequences": 3}),
        ({"max_tokens": 5, "logprobs": 2}, {"max_new_tokens": 5, "top_logprobs": 2}),
        ({"temp": 0.5, "mirostat": 1, "mirostat_ent": 3.0}, {"temperature": 0.5, "mirostat": 1, "mirostat_tau": 3.0}),
    ],
)
def test_other_programs_names_are_taken_where_they_mean_the_same(given, ours):
    assert settings_of(SamplingConfig(), 1, None, given).common == SamplingConfig(**ours)


def test_other_programs_names_are_answered_with_ours():
    for name in NAMES:
        assert name.other not in FIELDS
        assert not name.same or name.ours in FIELDS
        if name.other not in TAKEN:
            answer = rf"{name.other} \({name.library}\) (is .* here|has no counterpart)"
            with pytest.raises(ConfigError, match=answer):
                letters().generate("a", **{name.other: 1})
    with pytest.raises(ConfigError, match="max_tokens is another name of max_new_tokens; give one of them"):
        letters().generate("a", max_tokens=3, max_new_tokens=4)
    with pytest.raises(ConfigError, match="do_sample is 1; expected True or False"):
        letters().generate("a", do_sample=1)


SET = {  # a value that is not the default
    **{name: True for name, spec in FIELDS.items() if spec.default is False},
    **{name: 0.5 for name, spec in FIELDS.items() if spec.metadata["off"] is not None},
    **{"top_k": 3, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "min_new_tokens": 1, "min_length": 3},
    **{"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2, "smoothing_curve": 2.0, "adaptive_target": 0.3},
    **{"adaptive_decay": 0.5, "xtc_threshold": 0.2, "repetition_scope": "output", "penalty_scope": "both"},
    **{"penalty_window": 5, "dry_base": 2.0, "dry_allowed_length": 3, "dry_sequence_breakers": ["a"], "dry_window": 9},
    **{"repetition_stop_length": 5, "eos_token_id": 3, "exponential_decay_length_penalty": [2, 1.5], "seed": 4},
    **{"length_penalty": 2.0, "early_stopping": "never", "num_beam_groups": 2, "diversity_penalty": 0.5},
    **{"beam_method": "sample", "force_words": ["a"], "force_words_ids": [[1]]},
}
MET = {  # what makes a need met
    "num_beams is 1": {"num_beams": 4},
    "top_k is off": {"top_k": 3},
    "smoothing_factor is off": {"smoothing_factor": 0.3},
    "dynatemp_range is off": {"dynatemp_range": 0.3},
    "xtc_probability is off": {"xtc_probability": 0.3},
    "adaptive_target is not set": {"adaptive_target": 0.3},
    "mirostat is off": {"mirostat": 2},
    "repetition_penalty is off": {"repetition_penalty": 1.5},
    "presence_penalty and frequency_penalty are off": {"presence_penalty": 1.0},
    "repetition_penalty, presence_penalty, frequency_penalty are off": {"frequency_penalty": 1.0},
    "dry_multiplier is off": {"dry_multiplier": 1.0},
    "stop is empty": {"stop": ["a"]},
    "repetition_stop is off": {"repetition_stop": 3},
    "ignore_eos is on": {"ignore_eos": False},
    "no token is drawn (temperature 0, or plain beam search)": {"temperature": 1.0},
}
UNMET = {"ignore_eos is on": {"ignore_eos": True}}
UNMET |= {why: {"temperature": 0.0} for why in MET if why.startswith("no token is drawn")}


@pytest.mark.parametrize(("need", "name"), [(need, name) for need in NEEDS for name in need.fields])
def test_a_setting_that_does_nothing_is_refused_or_named_once(need, name, capsys):
    def found(**given) -> list[str]:
        config = SamplingConfig(**given)
        return [field for field, which in without_effect(config, switched_on(config)) if which is need]

    unmet = {**UNMET.get(need.why, {}), name: SET[name]}
    assert found(**unmet) == [name]
    assert found(**{**unmet, **MET[need.why]}) == []
    assert found(**UNMET.get(need.why, {})) == []
    if need.refused:
        with pytest.raises(ConfigError, match=f"{name} is set, but {need.why}; {need.refused}"):
            SamplingConfig(**unmet).validate()


def test_the_notice_names_what_this_call_sets(capsys):
    sampler = letters(seed=None)
    sampler.generate("a", temperature=0)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        sampler.generate("a", length_penalty=1.75, early_stopping=True)
    assert capsys.readouterr().err == "sampling: length_penalty and early_stopping have no effect: num_beams is 1\n"


def test_a_bias_of_a_text_is_that_of_its_spellings():
    sampler = letters()
    sampler.tokenizer.spaces_apart = True  # it has no space
    by_ids = sampler.generate("a", sequence_bias=[[[2, 3], 3.0], [[4], -2.0]])
    assert sampler.generate("a", logit_bias={"bc": 3.0, 4: -2.0}, sequence_bias=[]) != sampler.generate("a")
    assert sampler.generate("a", sequence_bias={(2, 3): 3.0, (4,): -2.0}) == by_ids, "transformers' form"
    spelled = sampler.processors_for(logit_bias={"bc": 3.0})[0][0].bias
    assert spelled == sampler.processors_for(sequence_bias=[["bc", 3.0]])[0][0].bias
    assert (2, 3) in spelled and set(spelled.values()) == {3.0}
    forbidden = sampler.generate(["a"] * 20, logit_bias={"b": "-inf"}, seed=1)
    assert not any("b" in done.text for (done,) in forbidden)
    with pytest.raises(ConfigError, match=r"logit_bias is .*; expected a bias for each token id or text"):
        sampler.generate("a", logit_bias={(260,): -1.0})
