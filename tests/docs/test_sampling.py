"""The catalogue of strategies, docs/sampling.md, against the code that it describes: neither can change alone."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import minigpt.sampling
from catalogue import written
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.cli.main import main
from minigpt.errors import ConfigError
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.search.expansion import RANKINGS
from minigpt.sampling.settings.config import FIELDS, PER_PROMPT, SamplingConfig
from minigpt.sampling.settings.conflicts import switched_on
from minigpt.sampling.settings.orders import CUSTOM, ORDERS, STEPS
from minigpt.sampling.settings.shape import FILTERS
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from processor_cases import filter_class, filter_setting
from table_model import FixedLM
from toys import random_model, tiny_config

ROOT = Path(__file__).parents[2]
PAGE_FILE = ROOT / "docs" / "sampling.md"
PAGE = PAGE_FILE.read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub("", PAGE)
BYTES = build_tokenizer(TokenizerConfig(kind="byte"))
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "minigpt" / "sampling").rglob("*.py")}

# Settings that ask for nothing but the one processor.
ASKING_FOR: dict[str, dict[str, Any]] = {
    "Temperature": {"temperature": 0.5},
    "DynamicTemperature": {"dynatemp_range": 0.5, "dynatemp_exponent": 2},
    "QuadraticSmoothing": {"smoothing_factor": 0.2, "smoothing_curve": 2},
    "TopK": {"top_k": 3},
    "ExactTopK": {"exact_top_k": True, "top_k": 3},
    "TopP": {"top_p": 0.5},
    "MinP": {"min_p": 0.1},
    "Typical": {"typical_p": 0.5},
    "Epsilon": {"epsilon_cutoff": 0.01},
    "Eta": {"eta_cutoff": 0.01},
    "TopA": {"top_a": 0.2},
    "TailFree": {"tail_free": 0.9},
    "TopNSigma": {"top_n_sigma": 1},
    "TopH": {"top_h": 0.4},
    "PLess": {"p_less": True},
    "XTC": {"xtc_probability": 0.5, "xtc_threshold": 0.2},
    "RepetitionPenalty": {"repetition_penalty": 1.1, "repetition_scope": "output", "penalty_window": 9},
    "PromptRepetitionPenalty": {"encoder_repetition_penalty": 1.1},
    "PresencePenalty": {"presence_penalty": 1, "penalty_scope": "both", "penalty_window": 9},
    "FrequencyPenalty": {"frequency_penalty": 1, "penalty_scope": "both", "penalty_window": 9},
    "DRY": {"dry_multiplier": 1, "dry_base": 2, "dry_allowed_length": 1, "dry_window": 9},
    "NoRepeatNGram": {"no_repeat_ngram_size": 3},
    "PromptNoRepeatNGram": {"encoder_no_repeat_ngram_size": 3},
    "LogitBias": {"logit_bias": {1: 1.0}},
    "SequenceBias": {"sequence_bias": [[[1], 1.0]]},
    "BadWords": {"bad_words": ["no"], "bad_words_ids": [[1, 2]]},
    "AllowedIds": {"allowed_token_ids": [1]},
    "Suppress": {"suppress_tokens": [1]},
    "MinNewTokens": {"min_new_tokens": 2},
    "MinLength": {"min_length": 2},
    "BeginSuppress": {"begin_suppress_tokens": [1]},
    "ForcedFirst": {"forced_bos_token_id": 1},
    "ForcedLast": {"forced_eos_token_id": 1},
    "ExponentialLengthDecay": {"exponential_decay_length_penalty": [2, 1.5]},
    "Mirostat1": {"mirostat": 1, "mirostat_tau": 3, "mirostat_eta": 0.2},
    "Mirostat2": {"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.2},
    "AdaptiveP": {"adaptive_target": 0.5, "adaptive_decay": 0.5},
    "Normalised": {"renormalize_logits": True},
}
ASKING_FOR |= {
    filter_class(f).__name__: filter_setting(f) for f in FILTERS if filter_class(f).__name__ not in ASKING_FOR
}
# Without a field of their own: for use from Python, or always there.
WITHOUT_FIELD = {"PrefixAllowed", "AllowedVocabulary", "Plain", "Foreign"}


def code(text: str) -> list[str]:
    """What stands between backticks; a pipe in a table is escaped."""
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", text)]


def tables() -> Iterator[list[dict[str, str]]]:
    """The page's tables, each row a dict by its table's head."""
    lines = PROSE.splitlines()
    for number, line in enumerate(lines):
        if not re.fullmatch(r"\|(-+\|)+", line):
            continue
        head = cells(lines[number - 1])
        rows = []
        for following in lines[number + 1 :]:
            if not following.startswith("|"):
                break
            assert len(cells(following)) == len(head), following
            rows.append(dict(zip(head, cells(following), strict=True)))
        yield rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


class Entry(NamedTuple):
    """A strategy as the page has it."""

    fields: list[str]
    classes: list[str]
    formulas: list[str]
    source: str
    off: list[str]

    def __repr__(self) -> str:
        return "-".join([*self.fields[:1], *self.classes])


ENTRIES = [
    Entry(code(row["fields"]), code(row["class"]), code(row["what it does"]), row["source"], code(row["off"]))
    for table in tables()
    for row in table
    if "fields" in row
]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=repr)
WORDS = {word for span in code(PROSE) for word in re.findall(r"\w+", span)}


@functools.cache
def definitions() -> dict[str, tuple[ast.ClassDef | ast.FunctionDef, str]]:
    """Name -> (its definition, its module's docstring), for all that minigpt.sampling defines at the top of a file."""
    found = {}
    for source in SOURCES.values():
        tree = ast.parse(source)
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[node.name] = (node, ast.get_docstring(tree) or "")
    return found


def docstrings(name: str) -> str:
    """All docstrings inside of a definition, its fields' included, and those of what it inherits from, in one line."""
    node, _ = definitions()[name]
    own = [
        inner.value.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str)
    ]
    bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
    return one_line(" ".join([*own, *(docstrings(base) for base in bases if base in definitions())]))


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@functools.cache
def callable_dataclasses() -> dict[str, set[str]]:
    """Module -> its public frozen dataclasses that can be called: processors and criteria."""
    found: dict[str, set[str]] = {}
    for info in pkgutil.walk_packages(minigpt.sampling.__path__, "minigpt.sampling."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if (
                inspect.isclass(value)
                and value.__module__ == module.__name__
                and not name.startswith("_")
                and dataclasses.is_dataclass(value)
                and value.__dataclass_params__.frozen  # type: ignore[attr-defined]
                and "__call__" in dir(value)
            ):
                found.setdefault(info.name.rpartition(".")[2], set()).add(name)
    return found


def test_every_field_is_on_the_page():
    assert set(FIELDS) - WORDS == set()


def test_every_step_is_on_the_page():
    assert set(STEPS) - WORDS == set()


def test_every_processor_and_criterion_has_an_entry():
    found = callable_dataclasses()
    assert {"truncation", "penalties", "bans", "endings", "adaptive", "scaling", "dry", "criteria"} <= set(found)
    assert set().union(*found.values()) - {name for entry in ENTRIES for name in entry.classes} == {"Plain", "Foreign"}
    assert "Plain" in WORDS


def test_every_search_method_is_on_the_page():
    named = {method for span in code(PROSE) for method in re.findall(r"^beam_method: (\w+)$", span)}
    assert named == set(RANKINGS)
    entries = {tuple(re.findall(r"beam_method: (\w+)", " ".join(entry.formulas))): entry.classes for entry in ENTRIES}
    for method, ranking in RANKINGS.items():
        assert ranking.__name__ in entries[method,]


def test_every_shipped_config_is_on_the_page_and_its_link_leads_there():
    shipped = {path.stem for path in (ROOT / "configs" / "sampling").glob("*.yaml")}
    assert {name for span in code(PROSE) for name in re.findall(r"^--config (\w+)$", span)} == shipped
    targets = re.findall(r"\[`--config (\w+)`\]\(([^)]+)\)", PROSE)
    assert {name for name, _ in targets} == shipped
    for name, target in targets:
        assert (PAGE_FILE.parent / target).resolve() == ROOT / "configs" / "sampling" / f"{name}.yaml"


@each_entry
def test_what_an_entry_names_exists(entry: Entry):
    assert entry.fields or entry.classes
    assert set(entry.fields) <= set(FIELDS)
    assert set(entry.classes) <= set(definitions())


@each_entry
def test_formulas_are_those_of_the_docstrings(entry: Entry):
    known = " ".join(docstrings(name) + " " + one_line(definitions()[name][1]) for name in entry.classes)
    for formula in entry.formulas:
        name, _, _ = formula.partition(":")
        if name not in FIELDS and formula not in ("length", "end", "stop", "time", "repetition", "context"):
            assert formula in known or formula in ("true", "false", "never", "slide")


@each_entry
def test_sources_are_those_of_the_docstrings(entry: Entry):
    assert set(ARXIV.findall(entry.source)) == {
        found for name in entry.classes for found in ARXIV.findall(docstrings(name))
    }


def test_every_arxiv_id_of_the_code_is_on_the_page_and_the_other_way_round():
    in_code = {found for name in definitions() for found in ARXIV.findall(docstrings(name))}
    assert len(in_code) > 10
    assert set(ARXIV.findall(PAGE)) == in_code


@each_entry
def test_off_is_what_the_code_calls_off(entry: Entry):
    off = dict(zip(entry.fields, entry.off, strict=False))
    assert len(off) == len(entry.off)
    for name, text in off.items():
        value, spec = yaml.safe_load(text), FIELDS[name]
        if spec.metadata["off"] is not None:
            assert value == spec.metadata["off"], name
        elif name != "temperature":  # whose default is on
            default = SamplingConfig.__dataclass_fields__[name].default_factory
            assert value == (spec.default if default is dataclasses.MISSING else default()), name
        if name in STEPS:
            assert name not in switched_on(SamplingConfig(**{"temperature": 1.0, name: value}))
    assert not [name for name in entry.fields if name not in off and FIELDS[name].metadata["off"] is not None]


def test_every_field_that_can_be_off_has_its_off_value_on_the_page():
    told = {name for entry in ENTRIES for name, _ in zip(entry.fields, entry.off, strict=False)}
    assert {name for name, spec in FIELDS.items() if spec.metadata["off"] is not None} <= told
    assert STEPS - {CUSTOM, "vocabulary"} <= told


def test_the_list_of_what_may_differ_from_prompt_to_prompt_is_complete():
    (sentence,) = re.findall(r"Such\s+lists are also accepted for(.*?)\.\n", PROSE, re.DOTALL)
    assert set(code(sentence)) == {name for name in PER_PROMPT if FIELDS[name].metadata["off"] is None} | {"stop"}
    # A number in the off column means the same, with the exceptions that the page names.
    numbers = {
        name
        for entry in ENTRIES
        for name, off in zip(entry.fields, entry.off, strict=False)
        if isinstance(yaml.safe_load(off), (int, float)) and off not in ("true", "false")
    }
    assert "the exceptions are `temperature`, `mirostat` and the fields of search" in one_line(PROSE)
    assert numbers - {"temperature", "mirostat", "num_beams", "num_beam_groups"} == {
        name for name in PER_PROMPT if FIELDS[name].metadata["off"] is not None
    }


@pytest.mark.parametrize("name", ASKING_FOR)
def test_the_fields_of_an_entry_make_its_class(name: str):
    """Together they must name every field that makes it, and make nothing else."""
    asked = ASKING_FOR[name]
    entries = [entry for entry in ENTRIES if name in entry.classes]
    assert set(asked) <= {field for entry in entries for field in entry.fields} | {"top_k"}
    sampler = Sampler(FixedLM([0.0] * 257), BYTES)
    processors, _ = sampler.processors_for(**{"temperature": 1.0, **asked})
    made = [type(processor).__name__ for processor in processors]
    assert [one for one in made if one != "Temperature" or name == "Temperature"] == [name]


def test_every_processor_of_the_page_is_asked_for_by_its_fields():
    processors = set().union(*(names for module, names in callable_dataclasses().items() if module != "criteria"))
    assert set(ASKING_FOR) | WITHOUT_FIELD == processors
    for entry in ENTRIES:
        if set(entry.classes) & WITHOUT_FIELD:
            assert not entry.fields


def test_the_orders_are_those_of_the_code():
    shown = {}
    for kind, text in FENCED.findall(PAGE):
        for name, feed, steps in re.findall(r"^(\w+) \(feed (\w+)\)\n((?: +.*\n)+)", text, re.MULTILINE):
            assert kind == "text"
            shown[name] = (tuple(steps.split()), feed)
    assert shown == {name: tuple(order) for name, order in ORDERS.items()}


def test_what_the_code_tells_is_on_the_page_as_it_tells_it():
    assert written(PAGE) == PAGE, "run: python tests/support/catalogue.py"


def test_what_a_search_refuses_is_refused_and_nothing_else():
    settings = {"max_time": 1, "repetition_stop": 2, "stop_sequences": [[1]], "top_logprobs": 1, "max_rows": 1}
    settings |= {"max_batch_tokens": 1, "min_new_tokens": 1, "ignore_eos": True, "overflow": "stop", "seed": 1}
    settings |= {"stop": ["x"], **{name: value for asked in ASKING_FOR.values() for name, value in asked.items()}}
    refused = set()
    for name, value in settings.items():
        given: dict[str, Any] = {"num_beams": 2, name: value}
        try:
            SamplingConfig(**given).validate()
        except ConfigError:
            refused.add(name)
    (sentence,) = re.findall(r"refuses (`.*?);", PROSE, re.DOTALL)
    assert set(code(sentence)) == refused


def test_the_files_of_settings_are_accepted():
    files = [text for kind, text in FENCED.findall(PAGE) if kind == "yaml"]
    assert files
    for text in files:
        SamplingConfig(**yaml.safe_load(text)).validate()


def test_every_flag_exists(capsys: pytest.CaptureFixture):
    with contextlib.suppress(SystemExit):
        main(["sample", "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    flags = {f"--{name.replace('-', '_')}" for name in re.findall(r"(?<![\w-])--(\w[\w-]*)", PAGE)}
    assert len(flags) > 8
    assert flags <= known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint that the examples load."""
    folder = tmp_path_factory.mktemp("docs")
    model = random_model(tiny_config("llama", vocab_size=257, block_size=64))
    save_checkpoint(folder / "runs" / "mine", model, BYTES)
    (folder / "prompts.txt").write_text("Once\nTwice\n")
    return folder


def test_commands_print_what_the_page_says(folder: Path, capsys: pytest.CaptureFixture):
    ((_, session),) = [block for block in FENCED.findall(PAGE) if block[0] == "console"]
    parts = re.findall(r"^\$ python sample.py (.*)\n((?:(?!\$).*\n)*)", session, re.MULTILINE)
    assert len(parts) == session.count("$ ")
    for command, output in parts:
        arguments = [str(folder / "runs" / "mine") if word == "RUN" else word for word in shlex.split(command)]
        assert main(["sample", *arguments]) == 0
        assert capsys.readouterr().out == output


def test_the_shell_examples_run(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    lines = [line for kind, text in FENCED.findall(PAGE) if kind == "bash" for line in text.splitlines()]
    assert len(lines) == 9
    for line in lines:
        words = shlex.split(line, comments=True)
        piped = words[: words.index("|")] if "|" in words else []
        python, script, *arguments = words[len(piped) + bool(piped) :]
        assert (python, script) == ("python", "sample.py")
        if piped:
            read, write = os.pipe()
            os.write(write, f"{piped[1]}\n".encode())
            os.close(write)
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(read, "rb")))
        arguments = ["runs/mine" if word == "RUN" else word for word in arguments]
        assert main(["sample", *arguments, "--max_new_tokens", "3"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(piped[1]) if piped else out or (folder / "out.jsonl").is_file()
    assert len((folder / "out.jsonl").read_text().splitlines()) == 2


def test_the_python_examples_run_and_do_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In the page's order, as a reader would; a text block right after one is its output."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    examples = re.findall(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", PAGE, re.MULTILINE | re.DOTALL)
    assert [bool(output) for _, output in examples] == [False, False, True, False, False]
    for example, output in examples:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(example, str(PAGE_FILE), "exec", dont_inherit=True), names)
        assert not output or said.getvalue().strip("\n") == output.strip("\n")
    assert said.getvalue().strip()

    def text_of(sampler: Sampler) -> bytes:
        ids = sampler.generate("a", max_new_tokens=50, seed=1, ignore_eos=True)[0][0].ids
        return bytes(token for token in ids if token < 256)

    assert text_of(names["sampler"]) == text_of(names["sampler"]).lower()
    plain = text_of(Sampler(names["run"].model, names["run"].tokenizer))
    assert plain != plain.lower()
    ends = Sampler(FixedLM([0.0] * 10 + [50.0] + [0.0] * 246), BYTES, criteria=[names["line_end"]])
    assert ends.generate("a", max_new_tokens=5)[0][0].finish_reason == "line"
    # By hand: the average after a token of probability 1 is 1 - 0.9, so the logits are divided by 1 + 0.5 * 0.1.
    average = names["Restless"]().accept(torch.zeros(1), torch.tensor([1]), torch.tensor([[0.0, 1.0]]), None)
    divided = names["Restless"]()(None, torch.tensor([[0.0, 2.1]]), average)
    assert divided.tolist() == [[0.0, pytest.approx(2.0)]]
