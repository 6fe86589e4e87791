"""`minigpt sample` with many prompts: rows as they come, a file that is continued, prompts that are piped in."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minigpt
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli import prompts as prompts_module
from minigpt.cli.main import main
from minigpt.sampling.sampler import Sampler
from minigpt.tokenizer.plain import ByteTokenizer
from toys import random_model, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model over bytes whose checkpoint asks for 6 tokens at temperature 1."""
    path = tmp_path_factory.mktemp("results") / "byte"
    model = random_model(tiny_config("llama", vocab_size=257))
    save_checkpoint(path, model, ByteTokenizer(), sampling={"max_new_tokens": 6, "temperature": 1.0})
    return str(path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture):
    """Run `minigpt sample`; (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["sample", *arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{'word ' * (number % 5)}{number}\n" for number in range(23)))
    return str(path)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(rows: list[dict]) -> list[tuple]:
    """What does not depend on the batch; log-probabilities do, in their last digits."""
    return [(row["prompt"], row["prompt_index"], row["sample_index"], row["ids"], row["text"]) for row in rows]


def test_a_file_of_results_is_continued_after_a_torn_row(folder: str, lines: str, said, tmp_path: Path) -> None:
    flags = (folder, "--prompt_lines", lines, "--seed", "5", "--num_return_sequences", "2")
    out = tmp_path / "out.jsonl"
    assert said(*flags, "--output", str(out))[0] == 0
    whole = out.read_bytes()
    rows = rows_of(out)
    places = [(row["prompt_index"], row["sample_index"], row["seed"]) for row in rows]
    assert places == [(prompt, sample, 5 + prompt) for prompt in range(23) for sample in range(2)]
    assert whole.decode() == said(*flags, "--json")[1], "the same rows as --json"
    for cut in (0, 1, len(whole) // 3, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        assert said(*flags, "--resume_from", str(out))[0] == 0
        assert told(rows_of(out)) == told(rows)
        assert out.read_bytes().startswith(whole[: whole[:cut].rfind(b"\n") + 1])
    before = out.read_bytes()
    assert said(*flags, "--output", str(out))[0] == 2, "a file that exists is not overwritten"
    assert said(*flags, "--resume_from", str(out), "--unordered")[0] == 0
    assert out.read_bytes() == before


def test_unordered_rows_are_the_same_rows(folder: str, lines: str, said, tmp_path: Path) -> None:
    flags = (folder, "--prompt_lines", lines, "--seed", "5", "--max_rows", "3")
    assert said(*flags, "--output", str(tmp_path / "a.jsonl"))[0] == 0
    assert said(*flags, "--output", str(tmp_path / "b.jsonl"), "--unordered")[0] == 0
    ordered, loose = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
    assert sorted(told(loose), key=lambda row: row[1]) == told(ordered)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n', "line 1 is no row of minigpt sample"),
        ("text\n", "line 1 is no row of minigpt sample"),
        ('{"prompt": "other", "prompt_index": 0, "sample_index": 0}\n', "line 1 is of prompt 0, which is another one"),
        ('{"prompt": "0", "prompt_index": 99, "sample_index": 0}\n', "line 1 is of prompt 99, which is another one"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(
    content: str, message: str, folder: str, lines: str, said, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    code, _, err = said(folder, "--prompt_lines", lines, "--resume_from", str(out))
    assert (code, err.count("\n")) == (2, 1) and message in err
    assert out.read_text() == content
    assert "cannot be written" in said(folder, "--resume_from", str(tmp_path / "none.jsonl"))[2]
    assert "give one of them" in said(folder, "--resume_from", str(out), "--output", str(out))[2]


def test_ctrl_c_keeps_what_is_written(folder: str, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Sampler.iterate

    def interrupted(self, *arguments, **settings):
        for number, done in enumerate(real(self, *arguments, **settings)):
            if number == 2:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(Sampler, "iterate", interrupted)
    code, out, _ = said(folder, "a", "b", "c", "d", "--json", "--seed", "1")
    assert code == 130 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "b"]
    code, out, _ = said(folder, "a", "b", "c", "d", "--seed", "1")
    assert code == 130 and out.count("--- prompt ") == 2
    file = tmp_path / "out.jsonl"
    code, _, err = said(folder, "a", "b", "c", "d", "--seed", "1", "--output", str(file))
    assert code == 130 and f"2 of 4 samples are in {file}; go on with --resume_from {file}" in err
    monkeypatch.undo()
    assert said(folder, "a", "b", "c", "d", "--seed", "1", "--resume_from", str(file))[0] == 0
    assert [row["prompt"] for row in rows_of(file)] == ["a", "b", "c", "d"]


def test_a_killed_command_is_continued_and_every_text_is_there_once(folder: str, said, tmp_path: Path) -> None:
    path, file = tmp_path / "many.txt", tmp_path / "out.jsonl"
    path.write_text("".join(f"{number} {'x' * (number % 40)}\n" for number in range(700)))
    flags = [folder, "--prompt_lines", str(path), "--seed", "1", "--max_rows", "16", "--unordered"]
    command = [sys.executable, "-m", "minigpt", "sample", *flags]
    started = subprocess.Popen([*command, "--output", str(file)], stdin=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and (not file.exists() or file.stat().st_size < 5000):
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = file.read_bytes()
    assert 0 < before.count(b"\n") < 700, "it was killed on the way"
    assert said(*flags, "--resume_from", str(file))[0] == 0
    rows = rows_of(file)
    assert sorted(row["prompt_index"] for row in rows) == list(range(700))
    assert file.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert {row["prompt_index"]: row["text"] for row in rows} == {
        row["prompt_index"]: row["text"] for row in map(json.loads, said(*flags, "--json")[1].splitlines())
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [["--prompt", "a"], ["--prompt", "b", "--json"]])
def test_a_full_disk_is_one_line(folder: str, flags: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minigpt", "sample", folder, *flags],
            stdout=full,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    assert (done.returncode, done.stderr) == (6, "minigpt: the output cannot be written (No space left on device)\n")


def test_a_full_file_of_results_says_how_to_go_on(
    folder: str, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Path.open
    file = tmp_path / "out.jsonl"
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full() if self == file else real(self, *a, **k))
    code, _, err = said(folder, "a", "b", "--output", str(file))
    assert code == 6 and "cannot be written (No space left on device); its rows stay, make room and go on with" in err
    monkeypatch.undo()
    assert said(folder, "a", "--resume_from", str(tmp_path))[2].endswith("is not a file\n")


def test_text_that_is_piped_in_is_the_prompt(
    folder: str, said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = (folder, "--seed", "3")
    expected = said(*flags, "piped in")[1]
    assert expected.startswith("piped in")

    def standard_input(content: bytes | None) -> None:
        read, write = os.pipe()
        if content is not None:
            os.write(write, content)
            os.close(write)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(read, "rb")))

    standard_input(b"piped in\n")
    assert said(*flags)[1] == expected
    standard_input(b"piped in\n")
    assert said(*flags, "--prompt", "-")[1] == expected
    standard_input(b"ignored")
    assert said(*flags, "piped in")[1] == expected
    standard_input(b"")
    empty = said(*flags, "--prompt", "")[1]
    assert said(*flags)[1] == empty
    (tmp_path / "file").write_bytes(b"piped in\r\n")
    with (tmp_path / "file").open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert said(*flags)[1] == expected
    monkeypatch.setattr(prompts_module, "PATIENCE", 0.05)
    standard_input(None)
    code, out, err = said(*flags)
    assert (code, out) == (0, empty) and "standard input is a pipe without text so far, and is ignored" in err
    assert "give prompts in one of the two ways" in said(folder, "a", "--prompt", "b")[2]
    assert "standard input is one prompt" in said(folder, "--prompt", "-", "--prompt", "b")[2]


MISTAKES = (
    ["--temperature", "-1"],
    ["--top_p", "1.5"],
    ["--seed", "-1"],
    ["--seed", "1,2"],
    ["--prompt_file", "nope"],
    ["--device", "tpu"],
    ["--resume_from", "nope"],
    ["--mirostat", "1", "--top_k", "3"],
    ["--n", "2", "--do_sample", "false"],
)


def test_a_mistake_is_told_before_anything_is_loaded(folder: str, tmp_path: Path) -> None:
    program = (
        "import json, sys; from minigpt.cli.main import main; "
        "print([main(['sample', sys.argv[1], *flags]) for flags in json.loads(sys.argv[2])], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder, json.dumps(MISTAKES)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    assert done.stdout == f"{[2] * len(MISTAKES)} False\n"
    assert done.stderr.count("\n") == done.stderr.count("minigpt: ") == len(MISTAKES)


def stored(folder: str, path: Path, **record) -> str:
    """A copy of the folder with another generation_config.json, and no manifest."""
    path.mkdir()
    for file in Path(folder).iterdir():
        if file.name != "manifest.json":
            (path / file.name).write_bytes(file.read_bytes())
    (path / "generation_config.json").write_text(json.dumps(record))
    return str(path)


def test_a_stored_setting_that_cannot_be_used_names_its_file_and_gives_way_to_a_flag(
    folder: str, said, tmp_path: Path
) -> None:
    path = stored(folder, tmp_path / "a", suppress_tokens=[-1])
    file = str(Path(path) / "generation_config.json")
    code, _, err = said(path, "a")
    assert code == 2 and f"(suppress_tokens is set in {file}; a flag overrides it)" in err
    assert said(path, "a", "--suppress_tokens", "1,2")[0] == 0
    with pytest.raises(minigpt.MinigptError, match=r"a/generation_config.json: sampling: suppress_tokens is \[-1\]"):
        minigpt.load(path).sampler()
    assert minigpt.load(path).model, "what is not sampled from opens"
    path = stored(folder, tmp_path / "b", do_sample=False)
    code, _, err = said(path, "a", "--num_return_sequences", "3")
    assert code == 2 and "temperature is set in" in err


def test_python_and_the_command_line_obey_the_checkpoints_settings_alike(folder: str, said, tmp_path: Path) -> None:
    path = stored(
        folder, tmp_path / "a", max_new_tokens=40, top_k=3, temperature=2.0, eos_token_id=list(range(0, 250, 3))
    )
    run = minigpt.load(path)
    ways = [
        run.sampler(),
        run.sampler(fast=False),
        Sampler.of(path),
        Sampler.of(run),
        Sampler(path),
        Sampler(run),
        Sampler(run, run.tokenizer),
    ]
    expected = json.loads(said(path, "abc", "--seed", "7", "--json")[1])
    assert expected["finish_reason"] == "end"
    for sampler in ways:
        assert sampler.config == run.sampling
        assert sampler.generate("abc", seed=7)[0][0].ids == expected["ids"]
    assert run.sampler(top_k=None, seed=7).generate("abc")[0][0].ids != expected["ids"]
    assert run.sampler({"max_new_tokens": 1}).config.top_k == 3
    assert run.sampler(minigpt.SamplingConfig()).config == minigpt.SamplingConfig()


def test_words_that_could_not_be_forced_and_texts_that_are_missing_are_told(folder: str, said) -> None:
    flags = ("--num_beams", "2", "--force_words_ids", "[[7, 8]]", "--max_new_tokens", "2", "--eos_token_id", "[]")
    code, _, err = said(folder, "a", *flags)
    assert code == 0 and "force_words" not in err
    code, _, err = said(
        folder, "a", "--num_beams", "3", "--n", "3", "--max_new_tokens", "1", "--allowed_token_ids", "1,2"
    )
    assert code == 0 and err == "prompt 1: 2 samples found, 3 asked for\n"


def test_nothing_to_score_is_said(folder: str, said) -> None:
    assert said(folder, "--prompt_ids", "97", "--score")[1].endswith(" bits per byte\n")
    assert said(folder, "--prompt", "", "--score")[1] == "0 tokens to score\n"
