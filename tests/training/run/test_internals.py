"""Snapshots while it trains: at which steps, of which weights, and that training does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest

import minigpt
from minigpt.checkpoint.runs import read_metrics
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError
from minigpt.internals.dynamics.context import held_out_windows
from minigpt.internals.dynamics.snapshot import numbers, snapshot
from minigpt.internals.study import Study
from minigpt.training.run.internals import due_by_doublings
from training_runs import assert_equal_to_the_bit, forked, losses, run_and_read, saved_tensors, tiny_run

LOG = {"internals__every": "log"}


def taken(rows: list[dict]) -> dict[int, dict[str, float]]:
    """The snapshots by step."""
    found = [(row["step"], {k: v for k, v in row.items() if k.startswith("internals/")}) for row in rows]
    assert len({step for step, row in found if row}) == sum(bool(row) for _, row in found)
    return {step: row for step, row in found if row}


def test_a_run_with_snapshots_is_to_the_bit_the_run_without(tmp_path: Path) -> None:
    changes = {"model__dropout": 0.2, "optimizer__ema_decay": 0.9, "batch__micro_batch_size": 2}
    plain, plain_rows = run_and_read(tiny_run(tmp_path, "plain", **changes))
    watched, rows = run_and_read(tiny_run(tmp_path, "watched", **changes, **LOG))
    assert list(taken(rows)) == [0, 1, 2, 3, 4, 6, 8] and not taken(plain_rows)
    assert losses(rows) == losses(plain_rows) and len(losses(rows)) == 8
    assert_equal_to_the_bit(saved_tensors(watched, 8), saved_tensors(plain, 8))
    assert rows[-1]["time/internals"] > 0 and "time/internals" not in plain_rows[-1]


def test_a_snapshot_is_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    run, rows = run_and_read(tiny_run(tmp_path, optimizer__ema_decay=0.9, internals__every=3))
    found = taken(rows)
    assert list(found) == [0, 3, 6, 8]
    [corpus] = (tmp_path / "data/corpus").iterdir()
    text = held_out_windows(open_corpus(corpus), 16)
    expected = numbers(snapshot(Study(minigpt.load(run)), text))
    assert found[8] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found[8] != pytest.approx(found[6], rel=1e-5, abs=1e-6)
    assert numbers(snapshot(Study(minigpt.load(run)))) == expected  # the run's own text, found again


def test_a_run_that_goes_on_takes_each_snapshot_once(tmp_path: Path) -> None:
    run_and_read(tiny_run(tmp_path, trainer__max_steps=4, **LOG))
    _, rows = run_and_read(tiny_run(tmp_path, trainer__max_steps=8, **LOG))
    assert list(taken(rows)) == [0, 1, 2, 3, 4, 6, 8]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up as on Linux")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_take_the_snapshots_of_one(tmp_path: Path, strategy: str) -> None:
    changes = {"trainer__max_steps": 3, "optimizer__ema_decay": 0.9, **LOG}
    _, one = run_and_read(tiny_run(tmp_path, "one", **changes))
    config = tiny_run(tmp_path, "two", trainer__devices=2, trainer__strategy=strategy, **changes)
    assert forked(config) == {0: 0, 1: 0}
    two = taken(read_metrics(tmp_path / "runs/two/metrics.jsonl"))
    assert list(two) == [0, 1, 2, 3]
    for step, row in taken(one).items():
        assert two[step] == pytest.approx(row, rel=1e-3, abs=1e-4)


def test_steps_by_doublings() -> None:
    steps = [step for step in range(1001) if due_by_doublings(step, 1000)]
    assert steps == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1000]


@pytest.mark.parametrize("every", [-1, float("nan")])
def test_steps_that_cannot_be_are_refused(tmp_path: Path, every: float) -> None:
    with pytest.raises(ConfigError, match=r"internals\.every: .* is negative or not finite"):
        tiny_run(tmp_path, internals__every=every).check()
