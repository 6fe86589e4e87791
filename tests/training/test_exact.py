"""The same steps, however they are divided: plain loop or Lightning, micro-batches, one, two or four processes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minigpt.data.batches import Batches
from minigpt.data.prepare import prepare
from minigpt.model.gpt import GPT
from minigpt.training.config import OptimizerConfig
from minigpt.training.launch import train
from minigpt.training.recipe.loss import next_token_loss
from minigpt.training.recipe.optimizer import make_optimizer
from minigpt.training.run.metrics import read_metrics
from toys import random_ids, random_model, tiny_config
from training_runs import forked, losses, run_and_read, tiny_run

MUON = {
    "optimizer__name": "muon",
    "optimizer__muon_learning_rate": 0.02,
    "optimizer__embedding_learning_rate": 0.1,
    "optimizer__weight_decay": 0.3,
}
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model__preset": "gpt2"},
    "modern": {"model__preset": "modern", **MUON},
}
# Clipped at most steps, accumulated, without decay to zero: every step counts.
STEPS = {
    "trainer__max_steps": 50,
    "trainer__gradient_clip_val": 0.5,
    "trainer__precision": "32-true",
    "batch__micro_batch_size": 2,
    "optimizer__schedule": "constant",
    "optimizer__learning_rate": 3e-3,
    "checkpoint__every": 40,
}


def batch_hashes(rows: list[dict[str, Any]]) -> list[str]:
    return [row["batch"] for row in rows if "batch" in row]


@pytest.mark.parametrize("preset", RECIPES)
def test_one_two_and_four_processes_take_the_same_steps(preset: str, tmp_path: Path) -> None:
    """Also with a number of processes that changes when the run is resumed."""
    changes = {**STEPS, **RECIPES[preset]}
    _, rows = run_and_read(tiny_run(tmp_path, "one", **changes))
    assert len(losses(rows)) == 50
    assert len(set(batch_hashes(rows))) == 50

    if preset == "gpt2":  # two processes for ten steps, then four
        forked(tiny_run(tmp_path, "many", **{**changes, "trainer__max_steps": 10, "trainer__devices": 2}))
        forked(tiny_run(tmp_path, "many", **changes, trainer__devices=4))
        compare(tmp_path)
    else:  # four for all steps; then the last ten steps again with two, and with one
        forked(tiny_run(tmp_path, "many", **changes, trainer__devices=4))
        compare(tmp_path)
        for devices in (2, 1):
            shutil.rmtree(tmp_path / "runs/many/checkpoints/step-00000050")
            config = tiny_run(tmp_path, "many", **changes, trainer__devices=devices)
            forked(config) if devices > 1 else train(config)
            compare(tmp_path)


def compare(folder: Path) -> None:
    one, many = (read_metrics(folder / f"runs/{name}/metrics.jsonl") for name in ("one", "many"))
    assert losses(many) == pytest.approx(losses(one), abs=1e-5)
    assert batch_hashes(many) == batch_hashes(one)


def test_fifty_modern_losses_equal_a_plain_loop_with_torchs_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, **{**STEPS, **RECIPES["modern"], "optimizer__schedule": "cosine"})
    _, rows = run_and_read(config)

    corpus = prepare(config.data, config.tokenizer)
    batches = Batches(corpus.train, 16, config.batch_size, config.seed)
    torch.manual_seed(config.seed)
    model = GPT(tiny_run(tmp_path, model__preset="modern", model__vocab_size=257).model)
    # Queries, keys and values as three parameters each, so that torch's Muon sees the matrices.
    split = {
        name: [torch.nn.Parameter(part.clone()) for part in parameter.detach().split(16)]
        for name, parameter in model.named_parameters()
        if name.endswith("attn.qkv.weight")
    }
    matrices, embeddings, decayed = [], [], []
    for name, parameter in model.named_parameters():
        if ".blocks." in name and parameter.dim() == 2:
            matrices += split.get(name, [parameter])
        else:
            embeds = name.startswith(("trunk.embed.", "trunk.bigram.", "trunk.trigram."))
            (embeddings if embeds else decayed).append(parameter)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())  # torch's Muon has no other dtype
    # Decay is the same part a step for all: 0.3 of the learning rate of the unembedding.
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3 * 3e-3 / 0.02, momentum=0.95, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "peak": 3e-3, "weight_decay": 0.3},
            {"params": embeddings, "peak": 0.1, "weight_decay": 0.3 * 3e-3 / 0.1},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    named = dict(model.named_parameters())
    expected = []
    for step in range(50):
        ids, targets = batches.read(step)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        # cosine to zero after two steps of warm-up
        progress = torch.tensor((step - 2) / 48, dtype=torch.float64)
        part = (step + 1) / 3 if step < 2 else float(1 + torch.cos(torch.pi * progress)) / 2
        for group in muon.param_groups:
            group["lr"] = 0.02 * part
        for group in adamw.param_groups:
            group["lr"] = group["peak"] * part
        for name, parts in split.items():
            for each, gradient in zip(parts, named[name].grad.split(16), strict=True):
                each.grad = gradient.clone()
        muon.step()
        adamw.step()
        with torch.no_grad():
            for name, parts in split.items():
                named[name].copy_(torch.cat([each.detach() for each in parts]))
        expected.append(loss.item())
    assert losses(rows) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 1


@pytest.mark.parametrize("preset", RECIPES)
def test_micro_batches_give_the_losses_of_the_whole_batch(preset: str, tmp_path: Path) -> None:
    """In float32, over ten steps, to 1e-6 relative."""
    changes = {**STEPS, **RECIPES[preset], "trainer__max_steps": 10, "batch__micro_batch_size": 8}
    _, whole = run_and_read(tiny_run(tmp_path, "whole", **changes))
    for rows_each in (1, 4):
        changes["batch__micro_batch_size"] = rows_each
        _, rows = run_and_read(tiny_run(tmp_path, f"by-{rows_each}", **changes))
        assert losses(rows) == pytest.approx(losses(whole), rel=1e-6)
        assert batch_hashes(rows) == batch_hashes(whole)


@pytest.mark.parametrize("preset", ["gpt2", "llama", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_give_the_weights_of_the_whole_batch_in_float64(preset: str, optimizer: str) -> None:
    """The loss, the clipping and the optimizer of a run, to 1e-10 over six steps."""
    start = random_model(tiny_config(preset)).double()
    settings = OptimizerConfig(name=optimizer, learning_rate=1e-3, weight_decay=0.1)
    results = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        steps = make_optimizer(model, settings, torch.float64)
        seen = []
        for step in range(6):
            ids = random_ids(8, 21, seed=step)
            total = 0.0
            for rows in ids.chunk(parts):
                loss = next_token_loss(model, rows[:, :-1], rows[:, 1:]) / parts
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            steps.step()
            steps.zero_grad()
            seen.append(total)
        results.append((seen, list(model.parameters())))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
