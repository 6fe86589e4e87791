"""The command line takes what people type, and its flags override its files whatever the order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt.cli.arguments import add_training_settings, make_parser, parse
from minigpt.cli.main import main
from minigpt.cli.sample import _parser
from minigpt.cli.typed import quoted, with_underscores
from minigpt.errors import ConfigError
from minigpt.sampling.settings.config import FIELDS


def parsed(*argv: str) -> tuple[dict[str, Any], list[str]]:
    """The settings that were given, and the positionals, of `minigpt sample`."""
    parser, positionals = _parser(), []  # type: ignore[var-annotated]
    values = parse(parser, list(argv), positionals)
    return {name: getattr(values, name) for name in parser.given}, positionals


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (["--top-p", "0.9", "--max-new-tokens", "5"], {"top_p": 0.9, "max_new_tokens": 5}),
        (["--top-p=.5"], {"top_p": 0.5}),
        (["--max_new_tokens", "1e3"], {"max_new_tokens": 1000}),
        (["--temperature", "1e-1"], {"temperature": 0.1}),
        (["--presence_penalty", "-1"], {"presence_penalty": -1.0}),
        (["--stop", "in"], {"stop": ["in"]}),
        (["--stop", "in", "--stop", "x, y", "--stop", "[b"], {"stop": ["in", "x, y", "[b"]}),
        (["--stop", '["a", "b"]'], {"stop": ["a", "b"]}),
        (["--stop+", "a"], {"stop": ["a"]}),
        (["--stop", "null: 1 # no"], {"stop": ["null: 1 # no"]}),
        (["--stop", "\U0001f600\x07\x7f\u2028"], {"stop": ["\U0001f600\x07\x7f\u2028"]}),
        (["--prompt_ids", "1,2,3"], {"prompt_ids": [[1, 2, 3]]}),
        (["--prompt_ids", "[1, 2]", "--prompt_ids", "3"], {"prompt_ids": [[1, 2], [3]]}),
        (["--bad_words_ids", "[[1, 2], [3]]"], {"bad_words_ids": [[1, 2], [3]]}),
        (["--bad_words_ids", "[]"], {"bad_words_ids": []}),
        (["--eos_token_id", "5"], {"eos_token_id": 5}),
        (["--eos_token_id", "5,6"], {"eos_token_id": [5, 6]}),
        (["--eos_token_id", "5", "--eos_token_id", "6"], {"eos_token_id": [5, 6]}),
        (["--eos_token_id", "null"], {"eos_token_id": None}),
        (["--seed", "1,2"], {"seed": [1, 2]}),
        (["--suppress_tokens", "1,2"], {"suppress_tokens": [1, 2]}),
        (["--ignore_eos", "--p_less"], {"ignore_eos": True, "p_less": True}),
        (["--ignore-eos", "no", "--p_less", "TRUE"], {"ignore_eos": False, "p_less": True}),
        (["--logit_bias", "{5: -inf, ' the': 1}"], {"logit_bias": {5: "-inf", " the": 1}}),
        (["--force_words", "dog", "--force_words", "[a, b]"], {"force_words": ["dog", "a", "b"]}),
        (["--order", "vllm"], {"order": "vllm"}),
        (["--order", "[min_p, temperature]"], {"order": ["min_p", "temperature"]}),
        (["--prompt", "--help me", "--prompt", "1e3"], {"prompt": ["--help me", "1e3"]}),
        (["--show-work"], {"show_work": 5}),
        (["--show_work", "3"], {"show_work": 3}),
        (["--n", "2", "--max-tokens", "7", "--stop_strings", "x"], None),
        (["--do_sample", "false"], {"temperature": 0.0}),
        (["--do-sample"], {}),
    ],
)
def test_a_flag_as_people_type_it(argv, given):
    found, positionals = parsed(*argv)
    expected = {"num_return_sequences": 2, "max_new_tokens": 7, "stop": ["x"]} if given is None else given
    assert found == expected
    assert positionals == []


def test_positionals_stand_anywhere():
    for argv in (
        ["run", "a b", "--json", "--seed", "3"],
        ["--json", "run", "--seed", "3", "a b"],
        ["--seed", "3", "--json", "--", "run", "a b"],
        ["run", "--ignore_eos", "a b"],
    ):
        assert parsed(*argv)[1] == ["run", "a b"]
    assert parsed("run", "--", "--top_p")[1] == ["run", "--top_p"]


def test_flags_override_files_and_later_files_earlier_ones_in_any_order(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("prompt: File\nmax-new-tokens: 1e1\ntop_k: 5\nstop: x\ntemperature: 0.5\n")
    (tmp_path / "b.yaml").write_text("top_k: 7\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    file = {"prompt": ["File"], "max_new_tokens": 10, "top_k": 5, "stop": ["x"], "temperature": 0.5}
    assert parsed("--config", a)[0] == file
    for argv in (
        ["--config", a, "--prompt", "Flag", "--max_new_tokens", "3", "--config", b],
        ["--prompt", "Flag", "--config", a, "--config", b, "--max_new_tokens", "3"],
        ["--max_new_tokens", "3", "--prompt", "Flag", f"--config={a}", f"--config={b}"],
    ):
        assert parsed(*argv)[0] == {**file, "prompt": ["Flag"], "max_new_tokens": 3, "top_k": 7}


def test_a_preset_that_is_shipped_is_told_from_a_file(tmp_path: Path):
    parser = _parser()
    parse(parser, ["--config", "llama_cpp_defaults", "--top_k", "3"])
    assert "penalty_window" in parser.preset and "top_k" not in parser.preset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "holds list"),
        ("just text\n", "holds str"),
        ("a: [\n", "cannot be read"),
        ("temperature: hot\n", '"temperature": Expected a number'),
        ("temperatur: 1\n", "--temperatur: no such setting; did you mean --temperature?"),
        ("max_length: 5\n", "max_length"),
        ("n: 2\nnum_return_sequences: 3\n", "n is another name of num_return_sequences"),
    ],
)
def test_a_file_with_a_mistake_is_named(content, message, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        parsed("--config", str(path))
    assert str(raised.value).startswith(f"--config {path}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_empty_file_is_no_settings_and_a_generation_config_is_settings(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parsed("--config", str(tmp_path / "empty.yaml"))[0] == {}
    record = {"_from_model_config": True, "transformers_version": "5.0.0", "do_sample": False, "top_k": 4}
    (tmp_path / "generation_config.json").write_text(json.dumps({**record, "bos_token_id": 1, "stop_strings": "x"}))
    expected = {"temperature": 0.0, "top_k": 4, "stop": ["x"]}
    assert parsed("--config", str(tmp_path / "generation_config.json"))[0] == expected


def test_another_programs_flag_is_answered_with_ours():
    with pytest.raises(ConfigError, match=r"--repeat_penalty \(llama.cpp\) is repetition_penalty here"):
        parsed("--repeat-penalty", "1.1")
    with pytest.raises(ConfigError, match="--top_q: no such setting; did you mean --top_"):
        parsed("--top-q", "1.1")
    with pytest.raises(ConfigError, match="--stop: expected a value after it"):
        parsed("--stop")


def test_training_settings_take_the_same_forms(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("model: {n-layer: 3}\noptimizer:\n  learning_rate: 1e-3\ndata: {source: x.txt}\n")
    parser = make_parser("minigpt train", "")
    add_training_settings(parser)
    argv = ["--trainer.max-steps", "1e2", "--config", str(tmp_path / "c.yaml"), "--model.n_layer", "2"]
    values = parse(parser, argv)
    assert (values.trainer.max_steps, values.model.n_layer, values.optimizer.learning_rate) == (100, 2, 1e-3)
    assert {"model.n_layer", "model.n-layer", "optimizer.learning_rate"} & parser.given >= {"model.n_layer"}
    with pytest.raises(ConfigError, match="more: not a flag; see minigpt train --help"):
        parse(parser, ["more"])


@pytest.mark.parametrize("verb", ["eval", "info", "heads", "lens", "inspect", "plan", "train", "prepare"])
def test_every_verb_takes_hyphens(verb: str, capsys: pytest.CaptureFixture):
    flag = {"train": "--run-nam", "prepare": "--data.val-fractio", "plan": "--run-nam", "info": "--jso"}.get(
        verb, "--devic"
    )
    assert main([verb, *(["x"] if verb in ("lens", "inspect") else []), flag, "1"]) in (2, 5)
    err = capsys.readouterr().err
    assert "did you mean" in err and flag[2:].replace("-", "_") in err


def test_any_text_can_be_quoted():
    import yaml

    text = "".join(map(chr, [*range(1, 0x250), 0x2028, 0xFEFF, 0x1F600, 0xE000]))
    assert yaml.safe_load(quoted(text)) == text
    assert with_underscores(["--a-b", "--c-d=e-f", "-o", "g-h", "--"]) == ["--a_b", "--c_d=e-f", "-o", "g-h", "--"]


def test_fields_are_flags():
    flags = {action.dest for action in _parser()._actions}
    assert set(FIELDS) <= flags
