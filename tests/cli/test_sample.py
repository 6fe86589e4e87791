"""`minigpt sample` as a person meets it, in process, on models small enough to be worked out by hand."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.settings.orders import resolve
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from toys import random_model, tiny_config

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "sampling").glob("*.yaml"))


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model over bytes, without settings of its own."""
    folder = tmp_path_factory.mktemp("cli_sample") / "byte"
    tokenizer = build_tokenizer(TokenizerConfig(kind="byte"))
    save_checkpoint(folder, random_model(tiny_config("llama", vocab_size=257)), tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The letters a to e with 1/2, 1/4, 1/8, 1/16 and 1/16, whatever came before."""
    folder = tmp_path_factory.mktemp("cli_sample") / "halves"
    model = GPT(tiny_config("gpt2", vocab_size=5)).eval()
    with torch.no_grad():
        model.trunk.norm.weight.zero_()
        model.trunk.norm.bias.zero_()[0] = 1.0
        model.trunk.embed.weight[:, 0] = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]).log()
    tokenizer = build_tokenizer(TokenizerConfig(kind="char"), lambda: ["abcde"])
    save_checkpoint(folder, model, tokenizer, sampling={"max_new_tokens": 1, "do_sample": True, "temperature": 1.0})
    return str(folder)


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run `minigpt sample`; (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["sample", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def printed(said):
    """What a call prints that succeeds."""

    def call(*arguments: str) -> str:
        code, out, err = said(*arguments)
        assert code == 0, err
        return out

    return call


def test_there_is_a_preset_to_try() -> None:
    assert {"greedy", "beam"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_shipped_preset_runs(preset: str, byte_model: str, printed) -> None:
    flags = (byte_model, "--config", preset, "--prompt", "a: b", "--max_new_tokens", "6", "--seed", "1")
    assert "a: b" in printed(*flags)


def test_greedy_takes_the_likeliest(halves: str, printed) -> None:
    assert printed(halves, "--config", "greedy", "--prompt", "e", "--max_new_tokens", "4") == "eaaaa\n"


def test_beams_print_the_best_with_their_scores(halves: str, printed) -> None:
    flags = ("--config", "beam", "--num_return_sequences", "3", "--max_new_tokens", "2", "--prompt", "e")
    # aa has (ln 1/2 + ln 1/2) / 2, and ab and ba have (ln 1/2 + ln 1/4) / 2.
    assert printed(halves, *flags).splitlines() == [
        *("--- sample 1 of 3 (length, score -0.6931) ---", "eaa"),
        *("--- sample 2 of 3 (length, score -1.0397) ---", "eab"),
        *("--- sample 3 of 3 (length, score -1.0397) ---", "eba"),
    ]
    rows = [json.loads(line) for line in printed(halves, *flags, "--json").splitlines()]
    assert [row["text"] for row in rows] == ["aa", "ab", "ba"]
    assert [row["score"] for row in rows] == pytest.approx([-math.log(2), -1.5 * math.log(2), -1.5 * math.log(2)])
    assert [row["seed"] for row in rows] == [None] * 3


def test_a_search_that_finds_fewer_texts_than_asked_for_says_so(halves: str, printed) -> None:
    flags = ("--config", "beam", "--num_return_sequences", "3", "--max_new_tokens", "1", "--prompt", "e")
    flags = (*flags, "--allowed_token_ids", "[0, 1]")
    assert printed(halves, *flags).splitlines() == [
        *("--- sample 1 of 3 (length, score -0.6931) ---", "ea"),
        *("--- sample 2 of 3 (length, score -1.3863) ---", "eb"),
    ]
    assert [json.loads(line)["missing"] for line in printed(halves, *flags, "--json").splitlines()] == [1, 1]


TABLE = [
    ["model", "TopK", "MinP"],
    ["'a'", "0.5000", "0.5714", "0.6667"],
    ["'b'", "0.2500", "0.2857", "0.3333"],
    ["possible", "5", "3", "2"],
    ["removed", "0", "2", "1"],
]


def test_the_work_is_shown_with_the_right_numbers(halves: str, printed) -> None:
    # 1/2 1/4 1/8 of 7/8 are 4/7 2/7 1/7, and 1/7 is less than half of 4/7.
    settings = ("--top_k", "3", "--min_p", "0.5", "--seed", "1", "--show_work", "2", "--prompt", "c")
    out = printed(halves, *settings)
    arrows = [line.startswith("->") for line in out.splitlines()]
    assert sum(arrows) == 1
    assert [line.removeprefix("->").split() for line in out.splitlines() if line] == TABLE
    chosen = re.search(r"^-> '(.)'", out, re.MULTILINE)
    assert chosen and f"c{chosen[1]}\n" == printed(halves, *settings[:6], "--prompt", "c")
    widths = {len(line) for line in out.splitlines() if line}
    assert len(widths) == 1, "the columns stand under each other"
    assert printed(halves, *settings, "--max_new_tokens", "3").count("possible") == 3


def test_a_removed_token_shows_as_a_dash(halves: str, printed) -> None:
    out = printed(halves, "--suppress_tokens", "[0]", "--seed", "1", "--show-work", "1", "--prompt", "c")
    (row,) = [line.split() for line in out.splitlines() if "'a'" in line]
    assert row == ["'a'", "0.5000", "-"]


def test_a_continuation_is_rated_token_by_token(halves: str, printed) -> None:
    flags = ("--prompt", "a", "--continuation", "bd", "--top_k", "3")
    lines = [line.split() for line in printed(halves, *flags).splitlines()[1:]]
    # ln 1/4 and ln 1/16; of the three kept b has ln 2/7; d and e share the fourth rank.
    assert lines == [
        ["-1.3863", "-1.2528", "2", "'b'"],
        ["-2.7726", "-inf", "4", "'d'"],
        ["-4.1589", "nats", "in", "all"],
    ]
    row = json.loads(printed(halves, *flags, "--json"), parse_constant=pytest.fail)
    assert row["ids"] == [1, 3]
    assert [details["processed_log_prob"] for details in row["details"]] == [pytest.approx(math.log(2 / 7)), None]
    assert printed(halves, "--config", "beam", *flags) == printed(halves, *flags), "what is given is not searched"
    shown = printed(halves, *flags, "--show_work", "2")
    assert shown.count("possible") == 2
    assert [line for line in shown.splitlines() if line.startswith("-> 'd'")]
    assert shown.endswith(printed(halves, *flags))


def test_a_score_is_the_models_own(halves: str, printed) -> None:
    # Nothing predicts the first letter: 2 and 4 bits for two bytes, whatever the settings for sampling.
    out = printed(halves, "--score", "--prompt", "abd", "--top_k", "1", "--temperature", "0")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["-1.3863", "rank", "2", "'b'"]
    assert rows[1] == ["-2.7726", "rank", "4", "'d'"]
    assert " ".join(rows[2]) == "2 tokens -4.1589 nats perplexity 8.0000 3.0000 bits per byte"
    row = json.loads(printed(halves, "--score", "--prompt", "abd", "--json", "--top_logprobs", "2"))
    assert (row["ids"], row["ranks"], row["log_probs"][0]) == ([0, 1, 3], [None, 2, 4], None)
    assert (row["perplexity"], row["bits_per_byte"]) == pytest.approx((8, 3))
    assert row["top"][1] == [[0, pytest.approx(math.log(1 / 2))], [1, pytest.approx(math.log(1 / 4))]]


def test_a_score_of_nothing_is_valid_json(halves: str, printed) -> None:
    row = json.loads(printed(halves, "--score", "--prompt", "a", "--json"), parse_constant=pytest.fail)
    assert (row["perplexity"], row["bits_per_byte"], row["total"]) == (None, None, 0)


def test_the_stride_is_that_of_the_windows(byte_model: str, printed) -> None:
    run = minigpt.load(byte_model)
    text = "a text of more than twenty-four bytes, the model's context"
    totals = set()
    for stride in (1, 7, 24):
        row = json.loads(printed(byte_model, "--score", "--prompt", text, "--stride", str(stride), "--json"))
        (score,) = Sampler(run.model, run.tokenizer).score(text, stride=stride)
        assert (row["log_probs"], row["total"]) == (score.log_probs, score.total)
        assert row["bits_per_byte"] == pytest.approx(-score.total / len(text) / math.log(2))
        totals.add(row["total"])
    assert len(totals) == 3


def test_prompts_as_ids_and_as_lines(halves: str, printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = ("--temperature", "0", "--max_new_tokens", "2")
    assert printed(halves, "--prompt_ids", "[1,2]", *greedy) == "bcaa\n"
    assert json.loads(printed(halves, "--prompt_ids", "[1,2]", *greedy, "--json"))["prompt"] == [1, 2]
    path = tmp_path / "lines.txt"
    path.write_text("b\ncc\n")
    flags = ("--prompt_lines", str(path), *greedy, "--seed", "4")
    lines = printed(halves, *flags)
    assert lines == ("--- prompt 1 of 2 (length, seed 4) ---\nbaa\n--- prompt 2 of 2 (length, seed 5) ---\nccaa\n")
    assert lines == printed(halves, "--prompt", "b", "--prompt", "cc", *greedy, "--seed", "4")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b\ncc")))
    assert printed(halves, "--prompt_lines", "-", *flags[2:]) == lines


def test_json_tells_what_each_token_was_among_the_others(halves: str, printed) -> None:
    flags = ("--prompt", "a", "--max_new_tokens", "3", "--seed", "2", "--top_logprobs", "2", "--top_k", "2", "--json")
    row = json.loads(printed(halves, *flags))
    assert len(row["details"]) == 3
    assert row["usage"] == {"prompt_tokens": 1, "completion_tokens": 3}
    for token, details in zip(row["ids"], row["details"], strict=True):
        after, rank, top, processed_top = (
            details[name] for name in ("processed_log_prob", "rank", "top", "processed_top")
        )
        assert after == pytest.approx(math.log([2 / 3, 1 / 3][token]))
        assert rank == token + 1
        assert top == [[0, pytest.approx(-math.log(2))], [1, pytest.approx(-math.log(4))]]
        assert processed_top == [[0, pytest.approx(math.log(2 / 3))], [1, pytest.approx(math.log(1 / 3))]]


def test_the_order_is_printed_and_nothing_is_written(halves: str, printed) -> None:
    flags = ("--temperature", "2", "--top_k", "3", "--min_p", "0.1", "--repetition_penalty", "1.2")
    assert [name(line) for line in printed(halves, *flags, "--show_order").splitlines()] == [
        "order transformers: beams feed log-probs to the processors",
        *("RepetitionPenalty", "Temperature", "TopK", "MinP"),
    ]
    lines = printed(halves, *flags, "--order", "llama_cpp", "--show_order").splitlines()
    assert [name(line) for line in lines[1:]] == ["RepetitionPenalty", "TopK", "MinP", "Temperature"]
    own = printed(halves, "--order", "[min_p, top_k]", "--top_k", "3", "--min_p", "0.1", "--show_order").splitlines()
    assert own[0].startswith("order own")
    assert [name(line) for line in own[1:]] == ["MinP", "TopK"]


def name(line: str) -> str:
    return line.strip().partition("(")[0]


def test_flags_lie_over_a_file_that_lies_over_the_checkpoint(printed, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    stored = SamplingConfig(max_new_tokens=2, top_k=7, top_p=0.5, repetition_penalty=1.5, logit_bias={3: -1.0})
    tokenizer = build_tokenizer(TokenizerConfig(kind="byte"))
    save_checkpoint(folder, random_model(tiny_config("gpt2", vocab_size=257)), tokenizer, sampling=stored.to_dict())
    (tmp_path / "own.yaml").write_text("top_k: 5\ntop_p: 0.6\n")
    out = printed(
        str(folder), "--config", str(tmp_path / "own.yaml"), "--top_p", "0.9", "--temperature", "1", "--show_order"
    )
    run = minigpt.load(folder)
    expected = SamplingConfig(
        max_new_tokens=2, top_k=5, top_p=0.9, repetition_penalty=1.5, logit_bias={3: -1.0}, temperature=1.0
    )
    processors, _ = Sampler(run.model, run.tokenizer, expected).processors_for()
    assert [line.strip() for line in out.splitlines()[1:]] == [repr(one) for one in processors]
    assert printed(str(folder), "--config", "greedy", "--show_order").count("Temperature(temperature=0") == 1
    row = json.loads(printed(str(folder), "--json", "--ignore_eos", "true"))
    assert len(row["ids"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "greedyy"], "greedyy"),
        (["--config", "nowhere/at/all.yaml"], "nowhere/at/all.yaml"),
        (["--prompt", "a", "--prompt_ids", "[1]"], "--prompt and --prompt_ids: give one of them"),
        (["--prompt", "a", "--prompt_lines", "-"], "--prompt and --prompt_lines: give one of them"),
        (["--prompt_lines", "nowhere.txt"], "--prompt_lines nowhere.txt: cannot be read"),
        (["--prompt_file", "nowhere.txt"], "--prompt_file nowhere.txt: cannot be read"),
        (["--prompt_lines", "EMPTY"], "holds no line; give one prompt a line"),
        (["--prompt_ids", "[1,9]"], "token id 9 at position 1 is outside the vocabulary of 5 tokens"),
        (["--prompt", "a", "--top_logprobs", "3"], "--top_logprobs: is shown in JSON only; add --json"),
        (["--prompt", "a", "--top_logprobs", "3", "--score"], "--top_logprobs: is shown in JSON only; add --json"),
        (
            ["--prompt", "a", "--top_logprobs", "3", "--continuation", "b"],
            "--top_logprobs: is shown in JSON only; add --json",
        ),
        (["--prompt", "a", "--mirostat", "2", "--top_k", "5"], "mirostat replaces top_k"),
        (["--prompt", "a", "--config", "precise", "--mirostat", "1"], "mirostat replaces top_p"),
        (["--prompt", "a", "--config", "greedy", "--num_return_sequences", "2"], "temperature is 0 (greedy), so all 2"),
        (["--prompt", "a", "--order", "hf"], "order is 'hf'; expected one of transformers, vllm, llama_cpp"),
        (["--prompt", "a", "--top_p", "1.5"], "top_p is 1.5; expected a number from 0 to 1"),
        (["--prompt", "a", "--stride", "3"], "--stride 3: is for --score"),
        (["--prompt", "a", "--score", "--stride", "0"], "stride is 0; expected a whole number"),
        (["--prompt", "a", "--score", "--continuation", "b"], "--score: generates nothing"),
        (["--prompt", "a", "--score", "--show_work"], "--score: generates nothing"),
        (["--prompt", "a", "--prompt", "b", "--show_work"], "--show_work: shows one text while it is generated"),
        (["--prompt", "a", "--config", "beam", "--show_work"], "--show_work: shows one text while it is generated"),
        (["--prompt", "a", "--show_work=-2"], "--show_work -2: expected a whole number"),
        (["--prompt", "a", "--suppress_tokens", "[0,1,2,3,4]"], "Suppress left no token to choose from"),
        (["--prompt", "a", "--suppress_tokens", "[0,1,2,3,4]", "--show_work"], "Suppress left no token to choose from"),
        (["--prompt", "a", "--logit_bias", "{9: 1.0}"], "names token 9; expected an id below"),
        (["--prompt", "a", "--device", "tpu"], "--device tpu: expected auto, cpu"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    flags: list[str], message: str, halves: str, said, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    code, _, err = said(halves, *(str(tmp_path / "empty.txt") if flag == "EMPTY" else flag for flag in flags))
    assert message in err
    assert err.startswith("minigpt: ")
    assert err.count("\n") == 1
    assert code == 2


@pytest.mark.parametrize(
    "flags",
    [
        {
            "early_stopping": ("never", "never"),
            "logit_bias": ("{3: -1.5}", {3: -1.5}),
            "sequence_bias": ("[[[1, 2], -2.0], [[3], 1]]", [[[1, 2], -2.0], [[3], 1]]),
            "eos_token_id": ("3", 3),
            "stop": ('["b", "\\n"]', ["b", "\n"]),
            "top_k": ("null", None),
            "order": ("[temperature, top_p]", ["temperature", "top_p"]),
            "force_words": ("[a, [b, c]]", ["a", ["b", "c"]]),
            "exponential_decay_length_penalty": ("[2, 1.5]", [2, 1.5]),
            "p_less": ("true", True),
            "forced_eos_token_id": ("[1, 2]", [1, 2]),
        },
        {"early_stopping": ("true", True), "eos_token_id": ("[3, 4]", [3, 4]), "order": ("vllm", "vllm")},
    ],
)
def test_settings_of_every_form_can_be_given_as_flags(
    flags: dict, halves: str, printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[SamplingConfig] = []
    monkeypatch.setattr(SamplingConfig, "validate", lambda self: given.append(self))
    monkeypatch.setattr(Sampler, "processors_for", lambda self: ([], resolve("vllm")))
    printed(halves, *(part for name, (text, _) in flags.items() for part in (f"--{name}", text)), "--show_order")
    assert {name: getattr(given[-1], name) for name in flags} == {name: value for name, (_, value) in flags.items()}


@pytest.mark.parametrize("more", [["--prompt", "b"], ["--json"], ["--num_beams", "2"], []])
def test_a_text_that_ends_in_an_error_makes_the_exit_code_2(halves: str, said, more: list[str]) -> None:
    code, _, err = said(halves, "--prompt", "a", "--suppress_tokens", "[0,1,2,3,4]", "--max_new_tokens", "2", *more)
    assert code == 2
    assert "Suppress left no token" in err


def test_lines_are_what_ends_in_a_line_feed_and_nothing_else(byte_model: str, printed, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("a\u2028b\fc\r\nd\n".encode())
    out = printed(byte_model, "--prompt_lines", str(tmp_path / "lines.txt"), "--max_new_tokens", "1", "--json")
    assert [json.loads(line)["prompt"] for line in out.split("\n") if line] == ["a\u2028b\fc", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prompt_file", ""], "--prompt_file"), (["--prompt_ids", "[]"], "--prompt_ids: holds no token id")],
)
def test_an_empty_source_of_prompts_is_no_empty_prompt(byte_model: str, said, arguments, message: str) -> None:
    code, _, err = said(byte_model, *arguments)
    assert code == 2
    assert message in err


def test_a_preset_without_beams_ends_a_stored_search(tmp_path: Path, printed) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(kind="byte"))
    model = random_model(tiny_config("llama", vocab_size=257))
    save_checkpoint(tmp_path / "run", model, tokenizer, sampling={"num_beams": 4, "max_new_tokens": 4})
    for preset in set(PRESETS) - {"beam"}:
        done = json.loads(printed(str(tmp_path / "run"), "--config", preset, "--prompt", "a", "--json"))
        assert done["score"] is None, preset


BYTE_E9 = "caf\udce9"  # how Python hands on the byte E9, which is no UTF-8, from a command line
WAYS = [[], ["--json"], ["--num_return_sequences", "2"], ["--score"], ["--score", "--json"], ["--show_work"],
        ["--continuation", "é漢"], ["--num_beams", "2"]]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("more", WAYS, ids=" ".join)
def test_what_a_terminal_cannot_show_is_spelled_and_json_is_the_same_everywhere(
    encoding: str, errors: str, more: list[str], byte_model: str, printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (byte_model, "--prompt", BYTE_E9, "--seed", "1", "--max_new_tokens", "8", *more)
    shown = printed(*flags)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        assert main(["sample", *flags]) == 0
    out.flush()
    written = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    if "--json" in more:
        assert json.loads(written) == json.loads(shown)
        assert json.loads(written)["prompt"] == "caf\ufffd"
    else:
        assert written == shown.encode(encoding, "backslashreplace").decode(encoding)


MARKED = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "ascii": b""}


@pytest.mark.parametrize("encoding", MARKED)
def test_a_prompt_is_the_text_of_its_file_without_the_mark_and_with_its_line_ends(
    encoding: str, byte_model: str, printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(*flags: str) -> list[list[int]]:
        lines = printed(byte_model, *flags, "--max_new_tokens", "0", "--json").splitlines()
        return [json.loads(line)["prompt_ids"] for line in lines]

    content = MARKED[encoding] + "One\r\ntwo\rthree\n".encode(encoding)
    (tmp_path / "prompt.txt").write_bytes(content)
    for flag, expected in {
        "--prompt_file": [b"One\r\ntwo\rthree\n"],
        "--prompt_lines": [b"One", b"two\rthree"],
    }.items():
        assert ids(flag, str(tmp_path / "prompt.txt")) == [list(prompt) for prompt in expected]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert ids(flag, "-") == [list(prompt) for prompt in expected]


@pytest.mark.parametrize("flag", ["--stop", "--bad_words", "--dry_sequence_breakers"])
def test_a_text_that_no_model_could_write_is_refused(flag: str, byte_model: str, said) -> None:
    code, _, err = said(byte_model, "--prompt", "a", flag, '["\udce9"]')
    assert (code, err.count("\n")) == (2, 1)
    with pytest.raises(ConfigError, match="a non-empty string that UTF-8 can encode"):
        SamplingConfig(**{flag.removeprefix("--"): ["\udce9"]}).validate()
