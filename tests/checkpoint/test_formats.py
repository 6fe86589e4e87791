"""Checkpoints of an older format load and go on; of a newer one they say what to install."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml

import fault_trials as trials
import minigpt
from minigpt.checkpoint import checkpoint
from minigpt.checkpoint.checkpoint import read_training_state
from minigpt.checkpoint.formats import FORMAT, MODEL_FIELDS, migrate_model, migrate_training
from minigpt.checkpoint.manifest import verify
from minigpt.errors import CheckpointError, ConfigError
from minigpt.model.config import GPTConfig
from minigpt.training.config import TrainConfig
from minigpt.training.launch import train
from minigpt.training.run.metrics import read_metrics
from training_runs import corpus_file, losses, run_and_read, tiny_run

GOLDEN = Path(__file__).parents[1] / "golden"


def gpt2_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers' own reading of the folder."""
    import transformers

    with torch.no_grad():
        return transformers.GPT2LMHeadModel.from_pretrained(folder)(ids).logits


def modern_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """One block with RMSNorm, RoPE, QK-norm, squared ReLU and a soft cap of 15, written out over the file's tensors."""
    t = safetensors.torch.load_file(folder / "model.safetensors")
    heads, width = 2, 4

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * t[name]

    def turn(x: torch.Tensor) -> torch.Tensor:  # (B, T, heads, width), pairs (i, i + width / 2)
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = t["trunk.embed.weight"][ids]
    names = [name for name in t if name.startswith("trunk.blocks.0.attn.") and "norm" in name]
    q_norm, k_norm = sorted(names, key=lambda name: "k_norm" in name or "norm_k" in name)
    qkv = norm(x, "trunk.blocks.0.norm1.weight") @ t["trunk.blocks.0.attn.qkv.weight"].T
    q, k, v = (part.unflatten(-1, (heads, width)) for part in qkv.chunk(3, -1))
    q, k = turn(norm(q, q_norm)), turn(norm(k, k_norm))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), v)
    x = x + mixed.flatten(-2) @ t["trunk.blocks.0.attn.proj.weight"].T
    hidden = F.relu(norm(x, "trunk.blocks.0.norm2.weight") @ t["trunk.blocks.0.mlp.up.weight"].T) ** 2
    x = x + hidden @ t["trunk.blocks.0.mlp.down.weight"].T
    logits = norm(x, "trunk.norm.weight") @ t["unembed.weight"].T
    return 15 * (logits / 15).tanh()


@pytest.mark.parametrize(("preset", "oracle"), [("gpt2", gpt2_logits), ("modern", modern_logits)])
def test_a_run_of_the_first_format_loads_and_goes_on(
    preset: str, oracle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by version 0.1.0 before there was Muon, an average or patience; its metrics go on to step 8."""
    shutil.copytree(GOLDEN / "format-1" / preset, tmp_path / "runs" / preset)
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / preset / "checkpoints/step-00000004"
    verify(folder)
    ids = torch.arange(16).view(2, 8) % 13
    with torch.no_grad():
        torch.testing.assert_close(minigpt.load(folder).model(ids), oracle(folder, ids), rtol=1e-4, atol=1e-5)

    told = [row for row in read_metrics(Path("runs") / preset / "metrics.jsonl") if "train/loss" in row]
    config = TrainConfig.from_dict(migrate_training(yaml.safe_load((folder / "train_config.yaml").read_text())))
    corpus_file(tmp_path)
    run, rows = run_and_read(config)
    assert losses(rows) == pytest.approx([row["train/loss"] for row in told], abs=1e-4)
    assert json.loads((run / "checkpoints/step-00000008/manifest.json").read_text())["format"] == FORMAT
    _, whole = run_and_read(replace(config, run_name="whole"))
    assert losses(rows)[4:] == pytest.approx(losses(whole)[4:], abs=1e-4)


def test_what_an_older_version_did_not_know_means_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.checkpoint import formats

    old = yaml.safe_load((GOLDEN / "format-1/modern/config.yaml").read_text())
    config = TrainConfig.from_dict(migrate_training(old))
    assert (config.optimizer.name, config.optimizer.ema_decay, config.eval.patience) == ("adamw", 0.0, 0)
    assert "name" not in old["optimizer"]  # the given one is left alone
    today = TrainConfig().to_dict()
    assert migrate_training(today) == today
    monkeypatch.setitem(formats.MODEL_FIELDS, 2, {"new_field": False})
    assert migrate_model({"n_layer": 1}, 1) == {"n_layer": 1, "new_field": False}
    assert migrate_model({"n_layer": 1, "new_field": True}, 1) == {"n_layer": 1, "new_field": True}
    assert migrate_model({"n_layer": 1}, 2) == {"n_layer": 1}
    assert migrate_training(old)["model"]["new_field"] is False


def test_every_field_that_came_later_has_its_line_in_the_table() -> None:
    """Else a checkpoint of the first format would be read with today's preset."""
    first = json.loads((GOLDEN / "format-1/modern/checkpoints/step-00000004/config.json").read_text())["minigpt"]
    later = {field.name for field in fields(GPTConfig)} - set(first)
    # attn_dropout follows dropout where it is not given, as it always did; settings are those of plug-ins
    assert later - set(MODEL_FIELDS[2]) == {"attn_dropout", "settings"}
    old = yaml.safe_load((GOLDEN / "format-1/modern/config.yaml").read_text())
    assert TrainConfig.from_dict(migrate_training(old)).optimizer.embedding_learning_rate == 0.01  # learning_rate


@pytest.mark.parametrize("name", ["config.json", "training_state.json", "manifest.json"])
def test_a_newer_format_names_what_to_install(name: str, tmp_path: Path) -> None:
    trials.save(tmp_path, 1)
    folder = tmp_path / "checkpoints/step-00000001"
    record = json.loads((folder / name).read_text())
    (record["minigpt"] if name == "config.json" else record)["format"] = 99
    record.update({"minigpt": "7.0"} if name == "manifest.json" else {})
    (folder / name).write_text(json.dumps(record))
    read: dict[str, Callable] = {
        "config.json": checkpoint.read_config,
        "training_state.json": read_training_state,
        "manifest.json": verify,
    }
    version = "minigpt-lab 7\\.0" if name == "manifest.json" else "a newer minigpt-lab"
    told = rf"{name}: has format 99, .* reads up to {FORMAT}; install {version} or later"
    with pytest.raises(CheckpointError, match=told):
        read[name](folder)


def test_another_optimizer_is_refused_at_resume(tmp_path: Path) -> None:
    train(tiny_run(tmp_path, trainer__max_steps=2))
    with pytest.raises(ConfigError, match=r"optimizer\.name 'adamw' -> 'muon'"):
        train(tiny_run(tmp_path, trainer__max_steps=4, optimizer__name="muon"))
