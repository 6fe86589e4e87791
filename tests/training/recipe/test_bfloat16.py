"""Training in bfloat16 on whatever CPU this is: asked for by name, and held to the digits that bfloat16 has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minigpt.data.batches import Batches
from minigpt.data.prepare import prepare
from minigpt.model.gpt import GPT
from minigpt.training.config import TrainConfig
from minigpt.training.launch import train
from minigpt.training.plan.choose import pick_precision
from minigpt.training.run.metrics import read_metrics
from training_runs import assert_equal_to_the_bit, forked, losses, run_and_read, saved_tensors, tiny_run

BF16 = {"trainer__precision": "bf16-mixed", "optimizer__schedule": "constant", "batch__micro_batch_size": 4}
RECIPES = {"gpt2": {}, "modern": {"model__preset": "modern", "optimizer__name": "muon"}}
EPS = torch.finfo(torch.bfloat16).eps  # 2^-7: a rounded product is off by up to half of it


@pytest.mark.parametrize("preset", RECIPES)
def test_its_losses_are_those_of_float32_to_the_digits_of_bfloat16(preset: str, tmp_path: Path) -> None:
    _, narrow = run_and_read(tiny_run(tmp_path, "narrow", **BF16, **RECIPES[preset]))
    wide = {**BF16, **RECIPES[preset], "trainer__precision": "32-true"}
    _, exact = run_and_read(tiny_run(tmp_path, "wide", **wide))
    assert losses(narrow) == pytest.approx(losses(exact), rel=2 * EPS)
    assert losses(narrow) != losses(exact)


def test_its_losses_equal_a_plain_loop_under_torchs_autocast(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, **{**BF16, "batch__micro_batch_size": None}, optimizer__warmup_steps=0)
    _, rows = run_and_read(config)

    batches = Batches(prepare(config.data, config.tokenizer).train, 16, config.batch_size, config.seed)
    torch.manual_seed(config.seed)
    model = GPT(tiny_run(tmp_path, model__vocab_size=257).model)
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) == matrices], "weight_decay": 0.25 * matrices}
        for matrices in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    plain = []
    for step in range(8):
        ids, targets = batches.read(step, slice(0, config.batch_size))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        plain.append(loss.item())
    assert losses(rows) == pytest.approx(plain, rel=EPS / 16)


def test_weights_and_moments_stay_in_float32_and_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    changes = {**BF16, **RECIPES["modern"], "model__dropout": 0.1}
    whole, whole_rows = run_and_read(tiny_run(tmp_path, "whole", **changes))
    train(tiny_run(tmp_path, "parts", **changes, trainer__max_steps=5))
    parts, rows = run_and_read(tiny_run(tmp_path, "parts", **changes))
    assert losses(rows) == losses(whole_rows)
    tensors = saved_tensors(whole, 8)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_equal_to_the_bit(saved_tensors(parts, 8), tensors)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_give_one_processs_losses_to_the_digits_of_bfloat16(tmp_path: Path) -> None:
    _, one = run_and_read(tiny_run(tmp_path, "one", **BF16))
    assert forked(tiny_run(tmp_path, "two", **BF16, trainer__devices=2)) == {0: 0, 1: 0}
    assert losses(read_metrics(tmp_path / "runs/two/metrics.jsonl")) == pytest.approx(losses(one), rel=EPS)


@pytest.mark.parametrize(("gain", "expected"), [(1.4, "32-true"), (3.0, "bf16-mixed")])
def test_auto_takes_bfloat16_where_its_products_are_faster(
    gain: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.training.plan.choose.WORTH", 1.5)
    monkeypatch.setattr("minigpt.training.plan.hardware.bfloat16_gain", lambda threads: gain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_precision(TrainConfig()) == (
        expected,
        f"on this CPU bfloat16 matrix products run at {gain:.2g} times the speed of float32",
    )
