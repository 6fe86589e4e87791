"""The meters in every row, against hand-worked numbers and an independent hash."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minigpt.data.batches import Batches
from minigpt.data.prepare import prepare
from minigpt.model.cost import cost_of
from minigpt.training.config import TrainConfig
from minigpt.training.plan import hardware
from minigpt.training.plan.hardware import accelerator_named, machine_memory, measured_peak, peak_flops, peak_memory
from minigpt.training.run import metrics as metrics_module
from minigpt.training.run.loader import MicroBatches
from minigpt.training.run.metrics import Metrics
from training_runs import run_and_read, tiny_run


def batches_of(config: TrainConfig) -> Batches:
    corpus = prepare(config.data, config.tokenizer, show=False)
    return Batches(corpus.train, config.model.block_size, config.batch_size, config.seed)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_hash_of_a_batch_is_that_of_what_all_processes_train_on(processes: int, tmp_path: Path) -> None:
    changes = {"batch__tokens": 256, "batch__micro_batch_size": 2, "trainer__max_steps": 5}
    _, rows = run_and_read(tiny_run(tmp_path, **changes))
    config = tiny_run(tmp_path, trainer__devices=processes, **changes)
    loaders = [iter(MicroBatches(batches_of(config), config, 0, rank)) for rank in range(processes)]
    for row in [row for row in rows if "batch" in row]:
        parts = [next(loader)[0] for loader in loaders for _ in range(config.accumulation)]
        ids = [token for part in parts for token in part.flatten().tolist()]
        assert len(ids) == 256
        assert row["batch"] == hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()[:16]
    assert len({row["batch"] for row in rows if "batch" in row}) == 5


class Clock:
    """Time as the test sets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_the_meters_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 128 tokens in 2.5 s, of which 0.5 s were a save and 0.4 s were spent waiting for batches."""
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    config = tiny_run(tmp_path, trainer__log_every_n_steps=4, model__vocab_size=257)
    loader: Any = SimpleNamespace(waited=0.0, batches=batches_of(config))
    trainer: Any = SimpleNamespace(
        is_global_zero=True, loggers=[], global_step=8, optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])]
    )
    module: Any = SimpleNamespace(gradient_norm=torch.tensor(2.0), device=torch.device("cpu"))
    agreement: Any = SimpleNamespace(losses={"loss": 1.5})
    metrics = Metrics(tmp_path, config, loader, agreement, 0)
    metrics.on_train_start(trainer, module)
    metrics.peak = 1e6 * cost_of(config.model).training_flops  # what a million tokens per second would need
    for step in range(1, 9):
        clock.now += 0.5 if step <= 4 else 0.25
        loader.waited += 0.1 if step <= 4 else 0.0
        if step == 2:
            clock.now += 0.5
            metrics.pause("save", 0.5)
        metrics.on_step_end(trainer, module, step)
        if step == 4:
            clock.now += 3.0
            metrics.pause("validation", 3.0)
    metrics.on_train_end(trainer, module)
    metrics.teardown(trainer, module, "fit")
    first, second, last = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["tokens_per_second"] == 4 * 128 / 2.0
    assert first["mfu"] == pytest.approx(256 / 1e6, abs=1e-4)
    assert first["data_wait"] == pytest.approx(0.4 / 2.0)
    assert (second["tokens_per_second"], second["data_wait"]) == (4 * 128 / 1.0, 0.0)
    assert (first["train/loss"], first["lr"], first["grad_norm"]) == (1.5, 0.5, 2.0)
    assert {key: value for key, value in last.items() if key.startswith("time/")} == {
        "time/step": 0.25,  # the first row, which has the compilation, does not count
        "time/validation": 3.0,
        "time/save": 0.5,
        "time/sample": 0.0,
        "time/training": 6.5,
    }


def test_utilisation_is_the_share_of_a_known_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, model__vocab_size=257, trainer__max_steps=3)
    step_flops = cost_of(config.model).training_flops * 128
    monkeypatch.setattr(metrics_module, "peak_flops", lambda device, precision: 1e9)
    _, rows = run_and_read(config)
    for row in rows[1:3]:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] / 128 * step_flops / 1e9, abs=1e-4)
        assert 0 < row["mfu"] < 5
    monkeypatch.setattr(metrics_module, "peak_flops", lambda device, precision: float("nan"))
    _, rows = run_and_read(tiny_run(tmp_path, "unknown", trainer__max_steps=3))
    assert all(row["mfu"] is None for row in rows if "mfu" in row)


def test_a_run_tells_where_its_time_went(tmp_path: Path) -> None:
    _, rows = run_and_read(tiny_run(tmp_path, eval__every=3, sample__max_new_tokens=4))
    spent = {key: value for key, value in rows[-1].items() if key.startswith("time/")}
    assert all(value > 0 for value in spent.values())
    parts = spent["time/validation"] + spent["time/save"] + spent["time/sample"] + 7 * spent["time/step"]
    assert rows[-1]["step"] == 8
    assert spent["time/training"] > 0.5 * parts
    assert not any(key.startswith("time/") for row in rows[:-1] for key in row)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_device_is_found_by_its_name(device: str, name: str | None) -> None:
    found = accelerator_named(device)
    assert (found.name if found else None) == name


def test_a_peak_is_measured_on_a_cpu_and_looked_up_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = peak_flops(torch.device("cpu"), "32-true")
    assert 1e8 < cpu < 1e15
    assert measured_peak(torch.float32, torch.get_num_threads()) == cpu  # measured once
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda", 0), "bf16-mixed") == 989.5e12
    assert peak_flops(torch.device("cuda", 0), "32-true") == 67e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_flops(torch.device("cuda", 0), "bf16-mixed") != peak_flops(torch.device("cuda", 0), "bf16-mixed")  # nan
    assert peak_flops(torch.device("mps"), "32-true") != peak_flops(torch.device("mps"), "32-true")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux")
def test_memory_is_the_most_that_the_process_held() -> None:
    cpu = torch.device("cpu")
    gc.collect()  # what earlier tests left must not go while this one measures
    before = peak_memory(cpu)
    assert before is not None
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert before >= 0.95 * now
    held: list[torch.Tensor] = []
    after = before  # the system may page memory out meanwhile, so more than the difference may be needed
    while after - before <= 2**25 and len(held) * 2**26 < before + 2**28:
        held.append(torch.ones(2**24))
        after = peak_memory(cpu) or 0
    del held
    assert after - before > 2**25
    total = machine_memory()
    assert total is not None
    assert total > after


def test_a_moment_in_which_the_machine_was_busy_does_not_decide_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def product(dtype: torch.dtype, size: int) -> float:
        nonlocal calls
        calls += 1
        if calls <= 9:  # something else ran
            return 5.0
        return 0.5 if dtype == torch.bfloat16 else 0.001

    monkeypatch.setattr(hardware, "_product", product)
    hardware.bfloat16_gain.cache_clear()
    assert hardware.bfloat16_gain(1) == 0.002
    hardware.bfloat16_gain.cache_clear()
