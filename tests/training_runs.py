"""Tiny training runs for the tests: a text of ten words, models of a few thousand parameters, a second or two."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from minigpt.data.config import DataConfig
from minigpt.model.config import GPTConfig
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.training.config import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    TrainerConfig,
)
from minigpt.training.launch import train
from minigpt.training.metrics import read_metrics


def corpus_file(folder: Path) -> Path:
    """About 4 KB of text in one file."""
    path = folder / "corpus.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "rats"]
    text = " ".join(words[hashlib.sha256(bytes([i % 251, i // 251])).digest()[0] % 10] for i in range(1000))
    path.write_text(text, encoding="utf-8")
    return path


def tiny_run(folder: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """A config whose runs live in `folder`; a change is named section__field, as in trainer__max_steps=4."""
    config = TrainConfig(
        run_name=name,
        runs_dir=str(folder / "runs"),
        seed=3,
        data=DataConfig(source=str(corpus_file(folder)), folder=str(folder / "data")),
        tokenizer=TokenizerConfig(kind="byte"),
        model=GPTConfig(preset="gpt2", block_size=16, n_layer=2, n_head=2, n_embd=16),
        batch=BatchConfig(tokens=128),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=2, schedule="cosine"),
        trainer=TrainerConfig(max_steps=8, log_every_n_steps=1, accelerator="cpu", threads=1),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=0),
        sample=SampleConfig(max_new_tokens=0),
    )
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            sections.setdefault(section, {})[field] = value
        else:
            config = replace(config, **{section: value})
    for section, values in sections.items():
        old = getattr(config, section)
        if section == "model":  # derived fields must follow from the new sizes and preset
            given = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "preset": "gpt2"}
            config = replace(config, model=GPTConfig(**{**given, **values}))
        else:
            config = replace(config, **{section: replace(old, **values)})
    return config


def run_and_read(config: TrainConfig) -> tuple[Path, list[dict[str, Any]]]:
    """Train; the run's folder and its rows of metrics."""
    run = train(config)
    return run, read_metrics(run / "metrics.jsonl")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """The training losses, by step."""
    return [row["train/loss"] for row in rows if "train/loss" in row]


def saved_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        **safetensors.torch.load_file(folder / "model.safetensors"),
        **safetensors.torch.load_file(folder / "training_state.safetensors"),
    }


def assert_equal_to_the_bit(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
