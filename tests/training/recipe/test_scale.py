"""Weights in pieces train as whole ones do, and blocks that are computed twice give what they gave once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forks import in_forks
from minigpt.checkpoint.manifest import verify
from minigpt.data.config import DataConfig
from minigpt.data.corpus import find_source
from minigpt.data.decoding import ReadingLog
from minigpt.errors import DataError
from minigpt.model.gpt import GPT
from minigpt.training.processes.join import connect, join
from minigpt.training.recipe import loss
from minigpt.training.recipe.loss import plain_loss
from minigpt.training.recipe.sharding import shard, whole
from minigpt.training.recipe.strategy import recompute_blocks
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.module import TrainingModule
from toys import random_ids, random_model, tiny_config
from training_runs import assert_equal_to_the_bit, forked, losses, run_and_read, saved_tensors, tiny_run

LAUNCH = Path(__file__).parents[3] / "configs" / "launch"

# Weights in pieces.


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def in_small_chunks(rank: int) -> None:
    """Let the loss come in chunks of a few tokens, in this process."""
    loss.CPU_LOGITS = 1000


def test_two_processes_with_a_part_of_the_weights_each_give_what_one_gives(tmp_path: Path) -> None:
    """Over 50 steps of Muon with clipping, accumulation, averaged weights, validation, samples and the loss in chunks.

    And each goes on from the other's checkpoint.
    """
    changes = {
        "model__preset": "modern",
        "model__block_size": 16,
        "optimizer__name": "muon",
        "optimizer__ema_decay": 0.9,
        "trainer__max_steps": 50,
        "trainer__gradient_clip_val": 0.5,
        "trainer__precision": "32-true",
        "batch__micro_batch_size": 2,
        "eval__every": 20,
        "checkpoint__every": 40,
        "sample__max_new_tokens": 8,
    }
    sharded = {"trainer__devices": 2, "trainer__strategy": "fsdp", **changes}
    one, one_rows = run_and_read(tiny_run(tmp_path, "one", **changes))
    in_pieces = tiny_run(tmp_path, "two", **sharded)
    assert forked(in_pieces, before=in_small_chunks) == {0: 0, 1: 0}
    two = tmp_path / "runs/two"
    two_rows = read_metrics(two / "metrics.jsonl")
    assert len(losses(two_rows)) == 50
    assert losses(two_rows) == pytest.approx(losses(one_rows), abs=1e-5)
    assert any(row["grad_norm"] > 0.5 for row in one_rows if "grad_norm" in row)  # clipping had something to do
    for key in ("grad_norm", "val/loss", "val/tokens"):
        expected = [row[key] for row in one_rows if key in row]
        assert expected
        assert [row[key] for row in two_rows if key in row] == pytest.approx(
            expected, rel=1e-3 if "norm" in key else 1e-5
        )
    assert (two / "samples/step-00000050.txt").read_text() == (one / "samples/step-00000050.txt").read_text()
    a, b = saved_tensors(one, 50), saved_tensors(two, 50)
    assert {name: tensor.shape for name, tensor in a.items()} == {name: tensor.shape for name, tensor in b.items()}
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in checkpoint_of(one, 50).iterdir()) == sorted(
        path.name for path in checkpoint_of(two, 50).iterdir()
    )

    for run in (one, two):  # each loses its last steps, and gets the other's checkpoint of step 40
        shutil.rmtree(checkpoint_of(run, 50))
    shutil.move(checkpoint_of(one, 40), tmp_path / "kept")
    shutil.copytree(checkpoint_of(two, 40), checkpoint_of(one, 40))
    shutil.rmtree(checkpoint_of(two, 40))
    shutil.move(tmp_path / "kept", checkpoint_of(two, 40))
    _, again = run_and_read(tiny_run(tmp_path, "one", **changes))
    assert losses(again) == pytest.approx(losses(one_rows), abs=1e-5)
    assert forked(in_pieces) == {0: 0, 1: 0}
    assert losses(read_metrics(two / "metrics.jsonl")) == pytest.approx(losses(one_rows), abs=1e-5)
    assert read_metrics(two / "metrics.jsonl")[-1]["step"] == 50


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp", 4)])
def test_the_loss_in_chunks_is_the_same_under_every_strategy(strategy: str, processes: int, tmp_path: Path) -> None:
    changes = {"model__n_layer": 3, "model__tie_embeddings": False, "optimizer__name": "muon"}
    _, rows = run_and_read(tiny_run(tmp_path, "one", **changes))
    config = tiny_run(tmp_path, "many", trainer__devices=processes, trainer__strategy=strategy, **changes)
    assert forked(config, before=in_small_chunks) == dict.fromkeys(range(processes), 0)
    many = read_metrics(tmp_path / "runs/many/metrics.jsonl")
    assert losses(many) == pytest.approx(losses(rows), abs=1e-5)


def test_blocks_may_send_their_weights_in_what_autocast_computes_in() -> None:
    def compare(rank: int) -> int:
        join(connect(), on_gpu=False)
        ids, targets = random_ids(2, 24), random_ids(2, 24, seed=1)
        model, copy = (random_model(tiny_config("llama"), scale=0.1) for _ in range(2))
        sent = []
        model.trunk.blocks[0].mlp.up.register_forward_pre_hook(lambda up, x: sent.append(up.weight.dtype))
        in_pieces = shard(model, torch.device("cpu"), plain_loss, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            values = in_pieces(model, ids, targets), plain_loss(copy, ids, targets)
        for value in values:
            value.backward()
        assert sent == [torch.bfloat16]
        assert float((values[0] - values[1]).abs()) < 1e-2
        for (name, piece), parameter in zip(model.named_parameters(), copy.parameters(), strict=True):
            assert piece.dtype == piece.grad.dtype == torch.float32
            difference = whole(piece.grad) - parameter.grad
            assert float(difference.norm()) < 0.02 * float(parameter.grad.norm()), name
        return 0

    assert in_forks(2, compare) == {0: 0, 1: 0}


def test_gradients_that_are_not_finite_stop_a_run_in_pieces_too(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        model__tie_embeddings=True,
        trainer__devices=2,
        trainer__strategy="fsdp",
        optimizer__learning_rate=1e30,
        trainer__gradient_clip_val=0.0,
        checkpoint__every=1,
    )
    assert forked(config) == {0: 7, 1: 7}
    saved = sorted((tmp_path / "runs/run/checkpoints").glob("step-*"))
    for folder in saved:
        verify(folder)
    for tensor in saved_tensors(tmp_path / "runs/run", int(saved[-1].name.removeprefix("step-"))).values():
        assert tensor.isfinite().all()


def test_one_process_has_nothing_to_share(tmp_path: Path) -> None:
    alone, rows = run_and_read(tiny_run(tmp_path, "fsdp", trainer__strategy="fsdp"))
    plain, plain_rows = run_and_read(tiny_run(tmp_path, "plain"))
    assert losses(rows) == losses(plain_rows)
    assert_equal_to_the_bit(saved_tensors(alone, 8), saved_tensors(plain, 8))


# Blocks computed twice.


def trained_once(model: GPT) -> dict[str, Tensor]:
    """Loss and gradients of one step; dropout draws from the seed 5."""
    model.train()
    torch.manual_seed(5)
    value = plain_loss(model, random_ids(2, 24), random_ids(2, 24, seed=1))
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("preset", ["gpt2", "llama", "modern"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_computed_again_give_the_same_gradients_to_the_bit(preset: str, dropout: float) -> None:
    plain, again = (random_model(tiny_config(preset, dropout=dropout)) for _ in range(2))
    recompute_blocks(again)
    assert list(again.state_dict()) == list(plain.state_dict())
    assert_equal_to_the_bit(trained_once(again), trained_once(plain))


def saved_bytes(model: GPT) -> int:
    """What a forward keeps for the backward pass, each storage once, parameters and ids left out."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no two storages are counted as one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plain_loss(model.train(), random_ids(2, 24), random_ids(2, 24, seed=1))
    return sum(kept.values())


def test_one_more_block_keeps_only_its_input() -> None:
    def difference(recompute: bool) -> int:
        sizes = []
        for n_layer in (3, 4):
            model = random_model(tiny_config("gpt2", n_layer=n_layer))
            if recompute:
                recompute_blocks(model)
            sizes.append(saved_bytes(model))
        return sizes[1] - sizes[0]

    block_input = 2 * 24 * 32 * 4  # B T C floats
    assert difference(recompute=True) == block_input
    assert difference(recompute=False) > 8 * block_input


class Operations(TorchDispatchMode):
    """The names of all operations, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(model: GPT, gradients: bool) -> list[str]:
    model.zero_grad()
    with Operations() as seen, torch.set_grad_enabled(gradients):
        value = plain_loss(model, random_ids(2, 24), random_ids(2, 24, seed=1))
        if gradients:
            value.backward()
    return seen.names


def test_a_model_that_is_not_to_compute_again_is_left_alone(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    model = random_model(tiny_config("gpt2"))
    before = {gradients: operations(model, gradients) for gradients in (True, False)}
    TrainingModule(model, config)
    assert {gradients: operations(model, gradients) for gradients in (True, False)} == before
    recompute_blocks(model)
    assert operations(model, False) == before[False]
    assert len(operations(model, True)) > len(before[True])


def test_a_run_that_computes_blocks_again_is_the_same_run_to_the_bit(tmp_path: Path) -> None:
    changes = {"model__dropout": 0.2, "batch__micro_batch_size": 4}
    plain, plain_rows = run_and_read(tiny_run(tmp_path, "plain", **changes))
    again, again_rows = run_and_read(tiny_run(tmp_path, "again", trainer__activation_checkpointing=True, **changes))
    assert losses(plain_rows) == losses(again_rows)
    assert_equal_to_the_bit(saved_tensors(plain, 8), saved_tensors(again, 8))


# The files that start a run.


def test_the_scripts_are_sound_and_name_what_is_there() -> None:
    scripts = sorted(LAUNCH.iterdir())
    assert [path.name for path in scripts] == ["one_machine.sh", "several_machines.sh", "slurm.sbatch"]
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
        [config] = re.findall(r"CONFIG:-(\w+)", path.read_text())
        assert (LAUNCH.parent / f"{config}.yaml").is_file()


def test_the_two_configs_of_gpt2_are_one_run() -> None:
    """What may differ is how the work is divided."""
    one, nodes = (yaml.safe_load((LAUNCH.parent / f"gpt2_124m{end}.yaml").read_text()) for end in ("", "_nodes"))
    assert one["trainer"].pop("devices") == nodes["trainer"].pop("devices") == 8
    assert nodes["trainer"].pop("num_nodes") == 4
    assert (one["batch"].pop("micro_batch_size"), nodes["batch"].pop("micro_batch_size")) == (32, 16)
    assert one == nodes


def test_a_corpus_to_be_supplied_says_how_and_then_reads_the_copy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"get it from https://\S+ and give the file or folder .* with --data.file"):
        find_source(DataConfig(source="fineweb_edu"))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for given in (tmp_path, tmp_path / "a.jsonl"):
        source = find_source(DataConfig(source="fineweb_edu", file=str(given), folder=str(tmp_path / "data")))
        assert source.name == "fineweb_edu"
        assert [text for text, _ in source.documents(ReadingLog())] == ["one", "two"]


# srun as far as the script needs it: the tasks, the numbers they get, and their largest exit code.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
  pids+=($!)
done
echo "${pids[@]}" >"$FAKE/pids"
worst=0
for pid in "${pids[@]}"; do
  wait "$pid" || { code=$?; ((code > worst)) && worst=$code; }
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >>"$FAKE/asked"
"""


class FakeSlurm:
    """A folder of commands that stand for SLURM's, and one job of two tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = 60_000
        while port >= 60_000:  # a free one, of those that the script makes of a job's number
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
        self.job = str(port - 20_000)
        folder.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, config: Path, run: str, *flags: str) -> subprocess.Popen:
        slurm = {"JOB_ID": self.job, "JOB_NODELIST": "here", "NTASKS": "2", "NNODES": "1"}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))},
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "PYTHON": sys.executable,
            "CONFIG": str(config),
            "RUN": run,
        }
        (self.folder / "pids").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), *flags],
            env=environment,
            cwd=LAUNCH.parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )

    def tasks(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]


def test_a_slurm_job_that_is_told_to_stop_queues_itself_again_and_ends_as_if_never_stopped(tmp_path: Path) -> None:
    changes = {
        "trainer__devices": 2,
        "trainer__max_steps": 60,
        "model__dropout": 0.2,
        "checkpoint__every": 1000,
        "batch__micro_batch_size": 1,
    }
    config = tiny_run(tmp_path, "given", **changes)
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump(config.to_dict()))
    whole = tiny_run(tmp_path, "whole", **changes)
    assert forked(whole) == {0: 0, 1: 0}

    slurm = FakeSlurm(tmp_path / "slurm")
    job = slurm.start(given, "queued")
    rows = tmp_path / "runs/queued/metrics.jsonl"
    while not (found := read_metrics(rows)) or found[-1]["step"] < 3:
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.02)
    for pid in slurm.tasks():
        os.kill(pid, signal.SIGTERM)
    _, said = job.communicate()
    assert job.returncode == 143, said
    assert (slurm.folder / "asked").read_text() == f"requeue {slurm.job}\n"
    assert read_metrics(rows)[-1]["step"] < 60

    job = slurm.start(given, "queued")
    _, said = job.communicate()
    assert job.returncode == 0, said
    assert (slurm.folder / "asked").read_text() == f"requeue {slurm.job}\n"  # the end is final
    assert losses(read_metrics(rows)) == losses(read_metrics(tmp_path / "runs/whole/metrics.jsonl"))
    assert_equal_to_the_bit(saved_tensors(tmp_path / "runs/queued", 60), saved_tensors(tmp_path / "runs/whole", 60))
