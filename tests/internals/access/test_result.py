"""Results: numbers with labels that print, save and look themselves up."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.internals.access.result import Axis, Result

GRID = Result(
    "scores",
    torch.tensor([[0.5, -2.0, 0.0], [1.5, 1.0, 0.25]]),
    (Axis("layer", ["L0", "L1"]), Axis("head", ["H0", "H1", "H2"])),
    unit="nats",
    notes={"sum": 1.25, "of": "two blocks"},
)
HOSTILE = "</td><script>alert(1)</script>"


def test_values_are_found_by_label_and_ranked() -> None:
    assert GRID["L0", "H1"] == -2.0
    assert GRID.top(2) == [(("L1", "H0"), 1.5), (("L1", "H1"), 1.0)]
    assert GRID.top(1, smallest=True) == [(("L0", "H1"), -2.0)]
    holed = Result("x", np.array([np.nan, 1.0, 2.0]), (Axis("token", ["a", "b", "c"]),))
    assert holed.top(5) == [(("c",), 2.0), (("b",), 1.0)]
    with pytest.raises(ConfigError, match="head 'H9': not one of H0, H1, H2"):
        GRID["L0", "H9"]


def test_labels_must_fit_the_values() -> None:
    with pytest.raises(ConfigError, match="labels for"):
        Result("x", np.zeros((2, 2)), (Axis("a", ["1", "2"]), Axis("b", ["1"])))


def test_a_grid_prints_every_number_under_its_labels() -> None:
    lines = str(GRID).splitlines()
    assert lines[0] == "scores (nats)"
    assert lines[1].split() == ["H0", "H1", "H2"]
    assert [cell.strip(" ░▒▓█") for cell in lines[2].split()] == ["L0", "0.500", "-2.000", "0.000"]
    assert lines[-1] == "sum 1.25  of two blocks"


def test_a_grid_tells_what_is_no_number_from_zero_and_keeps_its_columns_apart() -> None:
    values = np.array([[np.nan, -np.inf], [0.0, -12345.678]])
    lines = str(Result("x", values, (Axis("a", ["p", "q"]), Axis("b", ["r", "s"])))).splitlines()
    assert [cell.strip(" ░▒▓█") for cell in lines[2].split()] == ["p", "-", "-inf"]
    assert [cell.strip(" ░▒▓█") for cell in lines[3].split()] == ["q", "0.000", "-12345.678"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_long_list_prints_what_matters_and_says_what_it_left_out() -> None:
    values = np.zeros(100)
    values[[7, 60]] = (3.0, -4.0)
    text = str(Result("x", values, (Axis("neuron", [f"n{i}" for i in range(100)]),)))
    assert "n7 " in text and "n60" in text and "-4.0000" in text
    assert "... and 76 smaller" in text


def test_whitespace_shows() -> None:
    text = str(Result("x", np.ones(3), (Axis("token", ["\n", " ", "a b"]),)))
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["↵", "␣", "a"]


def test_json_and_csv_and_npz_hold_every_value_with_its_labels(tmp_path: Path) -> None:
    read = json.loads(GRID.save(tmp_path / "x.json").read_text())
    assert read == GRID.to_dict()
    assert read["values"] == [[0.5, -2.0, 0.0], [1.5, 1.0, 0.25]]
    assert read["axes"][1] == {"name": "head", "labels": ["H0", "H1", "H2"]}
    rows = list(csv.reader(GRID.save(tmp_path / "x.csv").open()))
    assert rows[0] == ["layer", "head", "nats"]
    assert [(a, b, float(value)) for a, b, value in rows[1:]] == [
        (f"L{layer}", f"H{head}", GRID[f"L{layer}", f"H{head}"]) for layer in range(2) for head in range(3)
    ]
    with np.load(GRID.save(tmp_path / "x.npz")) as file:  # which loads no pickle
        assert (file["values"] == GRID.values).all()
        assert file["axis1_head"].tolist() == ["H0", "H1", "H2"]
    with pytest.raises(ConfigError, match=r"\.json, \.csv, \.npz or \.html"):
        GRID.save(tmp_path / "x.pickle")


def test_what_is_not_a_number_becomes_null_in_json(tmp_path: Path) -> None:
    result = Result("x", np.array([np.nan, -np.inf, 1.0]), (Axis("a", ["1", "2", "3"]),), notes={"worst": np.inf})
    read = json.loads(result.save(tmp_path / "x.json").read_text())
    assert (read["values"], read["notes"]) == ([None, None, 1.0], {"worst": None})
    assert "nan" in result.save(tmp_path / "x.html").read_text()


@pytest.mark.parametrize("shape", [(2,), (2, 2), (2, 2, 2)])
def test_html_shows_labels_as_text_and_runs_nothing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    axes = tuple(Axis(HOSTILE, [HOSTILE, "b"]) for _ in shape)
    page = Result(HOSTILE, np.ones(shape), axes, notes={HOSTILE: HOSTILE}).save(tmp_path / "x.html").read_text()
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            tags.append(tag)

    Reader().feed(page)
    assert "script" not in tags
    assert tags.count("td") == 2 ** len(shape)
    assert "http:" not in page and "https:" not in page


def test_what_is_more_than_a_table_saves_as_one(tmp_path: Path) -> None:
    from minigpt.internals.causal.effect import logit_difference
    from minigpt.internals.study import Study
    from toys import random_ids, random_model, tiny_config

    study = Study.of(random_model(tiny_config("llama")))
    metric = logit_difference(3, 5)
    circuit = study.find_circuit(random_ids(1, 5), random_ids(1, 5, seed=1), metric)
    for made in (study.heads(causal=False), study.ov_circuit(0, 1), circuit):
        table = made.table()
        assert "<table>" in made._repr_html_()
        for ending in ("json", "csv", "npz", "html"):
            assert made.save(tmp_path / f"x.{ending}").stat().st_size > 0
        with np.load(tmp_path / "x.npz") as file:
            assert np.array_equal(file["values"], table.values)
    assert json.loads((tmp_path / "x.json").read_text())["edges"]
