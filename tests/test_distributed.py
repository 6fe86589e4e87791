"""Two processes give what one gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import assert_equal_to_the_bit, losses, run_and_read, saved_tensors, tiny_run

from minigpt.checkpoint import verify
from minigpt.training.launch import train
from minigpt.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Over 50 steps, with accumulation, clipping and validation; also when the end is lost and done again."""
    changes = {"trainer__max_steps": 50, "eval__every": 20, "model__preset": "llama", "checkpoint__every": 40}
    one, one_rows = run_and_read(tiny_run(tmp_path, "one", batch__micro_batch_size=2, **changes))
    two, two_rows = run_and_read(tiny_run(tmp_path, "two", batch__micro_batch_size=2, trainer__devices=2, **changes))
    assert len(losses(two_rows)) == 50
    assert losses(two_rows) == pytest.approx(losses(one_rows), abs=1e-5)
    norms = [[row["grad_norm"] for row in rows if "grad_norm" in row] for rows in (one_rows, two_rows)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    values = [[row["val/loss"] for row in rows if "val/loss" in row] for rows in (one_rows, two_rows)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    counts = [[row["val/tokens"] for row in rows if "val/tokens" in row] for rows in (one_rows, two_rows)]
    assert counts[0] == counts[1]
    a, b = saved_tensors(one, 50), saved_tensors(two, 50)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)

    shutil.rmtree(two / "checkpoints/step-00000050")  # two processes go on from step 40, to the bit
    _, again = run_and_read(tiny_run(tmp_path, "two", batch__micro_batch_size=2, trainer__devices=2, **changes))
    assert losses(again) == losses(two_rows)
    assert_equal_to_the_bit(saved_tensors(two, 50), b)

    shutil.rmtree(two / "checkpoints/step-00000050")  # now one process does
    _, again = run_and_read(tiny_run(tmp_path, "two", batch__micro_batch_size=4, **changes))
    assert losses(again) == pytest.approx(losses(one_rows), abs=1e-5)


def test_torchrun_starts_the_same_run(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "started", trainer__devices=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "train.py", "--config", str(tmp_path / "config.yaml")]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1], timeout=120)
    _, one = run_and_read(tiny_run(tmp_path, "one"))
    started = read_metrics(tmp_path / "runs/started/metrics.jsonl")
    assert losses(started) == pytest.approx(losses(one), abs=1e-5)


def test_a_process_that_fails_gives_its_exit_code(tmp_path: Path) -> None:
    from minigpt.errors import MinigptError

    config = tiny_run(tmp_path, trainer__devices=2, optimizer__learning_rate=1e30, trainer__gradient_clip_val=0.0)
    with pytest.raises(MinigptError, match=r"process \d ended \(exit code 7\); go on with --run_name run") as raised:
        train(config)
    assert raised.value.exit_code == 7
    for folder in (tmp_path / "runs/run/checkpoints").iterdir():
        verify(folder)
