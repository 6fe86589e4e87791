"""Snapshots as series: read from a run or measured from its checkpoints, in the terminal and as a page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from minigpt.cli.main import main
from minigpt.errors import CheckpointError, DataError
from minigpt.internals.access.result import Result
from minigpt.internals.dynamics.curves import HIGH, WIDE, chart, page, ticks
from minigpt.internals.dynamics.series import lines, moving_most, of_checkpoints, of_run, series
from training_runs import run_and_read, tiny_run

ROWS = [
    {"step": 0, "tokens": 0, "internals/induction/L0H0": 0.0, "internals/induction/L0H1": 0.5},
    {"step": 10, "train/loss": 4.0, "lr": 0.1},
    {"step": 10, "internals/induction/L0H0": 0.8, "internals/induction/L0H1": 0.5, "internals/in_context/score": -1.0},
    {"step": 10, "internals/induction/L0H0": 1.0},  # written anew by a run that went on: the later one counts
    {"step": 20, "val/loss": 3.0, "internals/induction/L0H0": None},
]


def test_rows_become_a_result_a_kind() -> None:
    found = series(ROWS)
    assert list(found) == ["loss", "in_context", "induction"]
    assert found["induction"].axes == (("step", ["0", "10"]), ("head", ["L0H0", "L0H1"]))
    assert found["induction"].values.tolist() == [[0.0, 0.5], [1.0, 0.5]]
    assert found["loss"].axes == (("step", ["10", "20"]), ("split", ["train", "val"]))
    np.testing.assert_equal(found["loss"].values, [[4.0, np.nan], [np.nan, 3.0]])
    assert series(ROWS[1:2]) == {}  # losses alone say nothing of the inside
    assert series([{"step": 1, "internals/new/x": 2}])["new"]["1", "x"] == 2


def test_lines_draw_each_kind_on_a_scale_of_its_own() -> None:
    text = lines(series(ROWS))
    assert re.search(r"Induction: steps 0 to 10, from 0 ▁ to 1 █\n  L0H0  ▁█ +0.000 -> 1.000\n  L0H1  ▅▅ ", text)
    assert re.search(r"Loss, nats: steps 10 to 20, from 3 ▁ to 4 █\n  train  █ +4.000 -> 4.000\n  val    ▁ ", text)


def many(labels: int) -> Result:
    """Label i climbs from 0 to i, and one is no finite values."""
    values = np.outer([0.0, 0.5, 1.0], np.arange(labels, dtype=float))
    values[:, 2] = np.nan
    names = [f"L0H{i}" for i in range(labels)]
    return Result("climbing", values, (("step", ["0", "5", "10"]), ("head", names)))  # type: ignore[arg-type]


def test_the_lines_that_change_most_are_shown() -> None:
    assert moving_most(many(20), 3) == [17, 18, 19]
    text = lines({"x": many(20)})
    assert "L0H19 " in text and "L0H7 " not in text and "... and 8 more that change less" in text
    svg = chart(many(20))
    assert svg.count('<path class="line rest"') == 11 and svg.count('class="name') == 8
    assert "grey: 12 more" in svg
    nothing = Result("x", np.full((2, 1), np.nan), (("step", ["0", "1"]), ("head", ["L0H0"])))  # type: ignore[arg-type]
    assert "no finite values" in chart(nothing) and "no finite values" in lines({"x": nothing})


def test_a_chart_puts_values_where_its_numbers_say() -> None:
    values = np.array([[0.0], [2.0], [1.0]])
    root = ElementTree.fromstring(chart(Result("x", values, (("step", ["0", "50", "100"]), ("head", ["a"])))))  # type: ignore[arg-type]
    [line] = [path for path in root.iter("path") if path.get("class", "").startswith("line")]
    points = [tuple(map(float, point.split(","))) for point in line.get("d", "")[1:].split(" L")]
    marks = {text.text: float(text.get("y", "")) - 3.5 for text in root.iter("text") if text.get("class") == "y"}
    steps = {text.text: float(text.get("x", "")) for text in root.iter("text") if text.get("class") == "x"}
    assert [y for _, y in points] == pytest.approx([marks["0"], marks["2"], marks["1"]], abs=0.2)
    assert points[1][0] == pytest.approx((steps["40"] + steps["60"]) / 2, abs=0.2)
    assert all(0 < x < WIDE and 0 < y < HIGH for x, y in points)


def test_steps_by_doublings_stand_evenly_on_a_logarithmic_scale() -> None:
    steps = [str(2**i - 1) for i in range(8)]
    result = Result("x", np.ones((8, 1)), (("step", steps), ("head", ["a"])))  # type: ignore[arg-type]
    root = ElementTree.fromstring(chart(result))
    [line] = [path for path in root.iter("path") if path.get("class", "").startswith("line")]
    places = [float(point.split(",")[0]) for point in line.get("d", "")[1:].split(" L")]
    assert np.diff(places) == pytest.approx([places[1] - places[0]] * 7, abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.8, [0, 0.2, 0.4, 0.6, 0.8]),
        (-4.1, 0, [-4, -2, 0]),
        (0, 400, [0, 100, 200, 300, 400]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_a_page_shows_markup_as_text_and_asks_for_nothing() -> None:
    evil = "</svg><script>alert(1)</script>"
    rows = [{"step": step, f"internals/{evil}/{evil}": step, "internals/stream/0": 1.0} for step in (0, 1)]
    made = page(evil, series(rows))
    assert "<script" not in made and "http" not in made.replace("http-equiv", "")
    assert made.count("&lt;script&gt;") >= 4
    assert "default-src 'none'" in made
    for svg in re.findall(r"<svg.*?</svg>", made, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return run_and_read(tiny_run(folder, internals__every=2, checkpoint__every=2, checkpoint__keep=9))[0]


def test_checkpoints_measured_afterwards_give_what_was_written(run: Path) -> None:
    written, measured = of_run(run), series(list(of_checkpoints(run)))
    for kind, result in measured.items():
        assert result.axes[0].labels == ["2", "4", "6", "8"]
        np.testing.assert_allclose(result.values, written[kind].values[1:], rtol=1e-4, atol=1e-5)


def test_the_verb_prints_draws_and_writes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dynamics", str(run)]) == 0
    assert "In-context score, nats: steps 0 to 8" in capsys.readouterr().out
    assert main(["dynamics", str(run), "--json", "-o", str(tmp_path / "inside.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["entropy"]["axes"][1] == {"name": "head", "labels": ["L0H0", "L0H1", "L1H0", "L1H1"]}
    assert (tmp_path / "inside.html").read_text().count("<svg") == len(found) == 9
    assert main(["dynamics", str(run), "--checkpoints", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stream"]["axes"][0]["labels"] == ["2", "4", "6", "8"]


def test_a_run_that_has_nothing_to_show_says_what_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    with pytest.raises(DataError, match=r"has no snapshots .* --internals\.every log, .* --checkpoints"):
        of_run(tmp_path)
    with pytest.raises(CheckpointError, match="contains no complete checkpoint"):
        list(of_checkpoints(tmp_path))
    assert main(["dynamics", str(tmp_path / "nothing")]) == CheckpointError.exit_code
    assert "contains no metrics.jsonl; give the folder of a run" in capsys.readouterr().err
    assert main(["dynamics", str(run), "-o", "curves.png"]) == 2
    assert "curves.png: expected a name that ends in .html" in capsys.readouterr().err
