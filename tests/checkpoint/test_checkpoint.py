"""A checkpoint is whole or is none: every damaged byte is found and named, and the one before is used."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.checkpoint.checkpoint import read_training_state, read_training_tensors
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.pruning import prune
from minigpt.checkpoint.runs import checkpoints_of, find_checkpoint, newest_valid
from minigpt.checkpoint.saving import save_checkpoint
from minigpt.durable import sealed
from minigpt.errors import CheckpointError, DiskError
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from toys import PRESETS, random_ids, random_model, tiny_config

BYTES = build_tokenizer(TokenizerConfig(kind="byte"))


def save(run: Path, step: int, preset: str = "llama") -> Path:
    return save_checkpoint(
        run / "checkpoints" / f"step-{step:08d}",
        random_model(tiny_config(preset), seed=step),
        BYTES,
        sampling={"temperature": 0.7},
        train_config={"seed": 1, "data": {"source": "ünïcode"}},
        state={"step": step, "seconds": 1.5},
        state_tensors={"exp_avg/trunk.embed.weight": torch.full((3, 2), float(step))},
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_loaded_is_what_was_saved(preset: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 3, preset)
    rng = torch.get_rng_state()
    run = minigpt.load(folder)
    assert torch.equal(torch.get_rng_state(), rng)  # loading draws no random number
    model, ids = random_model(tiny_config(preset), seed=3), random_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(run.model(ids), model(ids))
    assert run.model.config == model.config
    assert run.tokenizer.hash == BYTES.hash
    assert run.stored_sampling == {"temperature": 0.7}
    assert run.config == {"seed": 1, "data": {"source": "ünïcode"}}
    tied = run.model.unembed.weight is run.model.trunk.embed.weight
    assert tied == model.config.tie_embeddings
    assert read_training_state(folder) == {"step": 3, "seconds": 1.5}
    assert torch.equal(read_training_tensors(folder)["exp_avg/trunk.embed.weight"], torch.full((3, 2), 3.0))


def test_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    assert minigpt.load(tmp_path).path.name == "step-00000010"


@pytest.mark.parametrize("name", [
    "model.safetensors", "config.json", "minigpt_tokenizer.json", "generation_config.json", "train_config.yaml",
    "training_state.safetensors", "training_state.json", "manifest.json",
])  # fmt: skip
def test_every_flipped_bit_and_every_truncation_is_found(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    file = folder / name
    whole = file.read_bytes()
    draw = random.Random(name)
    damaged = [b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\n"]
    for _ in range(12):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    for content in damaged:
        file.write_bytes(content)
        if name == "manifest.json" and content.strip() == whole.strip():
            continue  # white space at the end of the manifest changes nothing it says
        with pytest.raises(CheckpointError, match=name):
            verify(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=name):
        verify(folder)
    file.write_bytes(whole)
    verify(folder)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"]["config.json"]
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError, match="no plain file"):
        verify(folder)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    shutil.move(folder / "config.json", tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is missing or no plain file"):
        verify(folder)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    said: list[str] = []
    assert newest_valid(tmp_path, said.append) == tmp_path / "checkpoints" / "step-00000001"
    assert len(said) == 1
    assert "step-00000002/model.safetensors" in said[0]
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_pruning_never_counts_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000005/config.json").unlink()
    (tmp_path / "checkpoints/.tmp-step-00000009-1").mkdir()
    prune(tmp_path, keep=2)
    assert [path.name[-1] for path in checkpoints_of(tmp_path)] == ["5", "4", "3"]
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failing_disk_leaves_the_checkpoint_before(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(DiskError, match="the disk is full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    verify(tmp_path / "checkpoints/step-00000001")


def test_what_is_no_checkpoint_is_described(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        minigpt.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"it holds \['notes\.txt'\]"):
        minigpt.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint yet"):
        minigpt.load(tmp_path)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for name in ("model.safetensors", "manifest.json"):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        minigpt.load(folder)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"has format 99, minigpt-lab .* reads up to 2; install minigpt-lab 0\.1\.0 or later"
    ):
        verify(folder)
