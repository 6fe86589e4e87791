"""A checkpoint is a folder, complete by itself: weights, config, tokenizer, sampling defaults, training state.

    step-00000500/
        model.safetensors, config.json      Hugging Face's layout where it can hold the model, else our own names
        minigpt_tokenizer.json              the tokenizer
        generation_config.json              sampling defaults
        train_config.yaml                   the resolved config of the run that wrote it
        training_state.safetensors, .json   optimizer moments by parameter name, counters
        manifest.json                       size and sha256 of every file, written last

It is written to a temporary sibling, synced, renamed and read back; only then are older ones pruned. So at any moment,
whatever is killed or fills up, the last good checkpoint is whole. Nothing in it is a pickle: reading one runs no code.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from minigpt.durable import disk_errors, file_sha256, is_intact, sealed, sync, to_json
from minigpt.errors import CheckpointError, ConfigError
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT
from minigpt.model.layers import Rotary
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.build import load_tokenizer, save_tokenizer
from minigpt.weights import config_from_huggingface, from_huggingface, to_huggingface

FORMAT = 1
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass
class Run:
    """What `load` returns: everything needed to sample from a model or to study it."""

    model: GPT
    tokenizer: Tokenizer
    config: dict[str, Any]
    """The resolved training config; empty where the folder holds none (a Hugging Face folder)."""
    sampling: dict[str, Any]
    """generation_config.json: sampling defaults."""
    path: Path
    """The checkpoint folder that was read."""


# Writing.


def state_of(model: GPT) -> dict[str, Tensor]:
    """The model's tensors by name, a shared one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_checkpoint(
    folder: Path,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    sampling: dict[str, Any] | None = None,
    train_config: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    state_tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write a complete checkpoint to `folder`, which must not exist, durably.

    Args:
        folder: where; its parent is made. Its temporary sibling lies beside it.
        model: its weights are written in Hugging Face's layout where that needs no invented tensor.
        tokenizer: saved with it.
        sampling: generation_config.json.
        train_config: the resolved config, plain values.
        state: counters of training, JSON-able; None for a checkpoint that is not to be resumed.
        state_tensors: optimizer moments and the like, by name.

    Raises:
        DiskError: the disk is full, read-only or failing; nothing at `folder` then, older checkpoints untouched.
        CheckpointError: what was written does not read back as it was.
    """
    weights = state_of(model)
    layout = to_huggingface(model.config, weights)
    hf_config, tensors = layout or ({"model_type": "minigpt", "architectures": ["GPT"]}, weights)
    config = {**hf_config, "minigpt": {"format": FORMAT, **model.config.to_dict()}}
    if tokenizer.eot is not None:
        config["bos_token_id"] = config["eos_token_id"] = tokenizer.eot

    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    with disk_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with disk_errors(str(folder)):
            _write_tensors(temporary / "model.safetensors", tensors)
            (temporary / "config.json").write_text(to_json(config), encoding="utf-8")
            save_tokenizer(tokenizer, temporary)
            (temporary / "generation_config.json").write_text(to_json(sampling or {}), encoding="utf-8")
            if train_config is not None:
                text = yaml.safe_dump(train_config, sort_keys=False, allow_unicode=True)
                (temporary / "train_config.yaml").write_text(text, encoding="utf-8")
            if state is not None:
                _write_tensors(temporary / "training_state.safetensors", state_tensors or {})
                (temporary / "training_state.json").write_text(to_json({"format": FORMAT, **state}), encoding="utf-8")
            files = sorted(path for path in temporary.iterdir())
            entries = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
            for path in files:
                sync(path)
            manifest = sealed({"format": FORMAT, "files": entries})
            (temporary / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
            sync(temporary / MANIFEST)
            sync(temporary)
            _move_aside(folder)
            os.rename(temporary, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    verify(folder)
    return folder


def _move_aside(folder: Path) -> None:
    """A damaged checkpoint of the same step makes way; it stays beside the others for a person to look at."""
    if not folder.exists():
        return
    try:
        verify(folder)
    except CheckpointError:
        os.rename(folder, folder.with_name(f"damaged-{folder.name}-{secrets.token_hex(4)}"))
    else:
        raise CheckpointError(f"{folder}: exists already and is whole; it is not overwritten")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt"})


# Reading and verifying.


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def verify(folder: Path) -> None:
    """Check every file against the manifest. Raises CheckpointError that names the first file that differs."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished; use an earlier checkpoint")
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT and isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: has format {manifest['format']}, this version reads {FORMAT}; update minigpt-lab"
        )
    if not is_intact(manifest) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: was altered (its own checksum differs); use an earlier checkpoint")
    for name, entry in manifest["files"].items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: is missing or no plain file; use an earlier checkpoint")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, {entry['bytes']} were written; use an earlier checkpoint"
            )
        if file_sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: was altered (sha256 differs from the manifest); use an earlier checkpoint")


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first, finished or not."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_valid(run: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint of a run that verifies; `say` hears of each one skipped and why."""
    for path in checkpoints_of(run):
        try:
            verify(path)
        except CheckpointError as error:
            say(f"skipping a damaged checkpoint: {error}")
        else:
            return path
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints that verify, and what unfinished saves left behind."""
    valid = 0
    for path in checkpoints_of(run):
        if valid >= keep:
            shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            verify(path)
            valid += 1
        except CheckpointError:
            continue  # left for a person to look at; it never counts as one of those kept
    clean_leftovers(run)


def clean_leftovers(run: Path) -> None:
    """Remove the temporary folders of saves that were killed."""
    for path in (run / "checkpoints").glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(path: Path | str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The checkpoint folder that a path means: a run's newest valid one, or the folder itself.

    Raises CheckpointError saying what is there and what was expected.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        newest = newest_valid(path, say)
        if newest is None:
            raise CheckpointError(f"{path}: this run holds no finished checkpoint yet")
        return newest
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give a run, a checkpoint folder or a Hugging Face folder")
    there = sorted(child.name for child in path.iterdir())[:8] if path.is_dir() else "a file"
    raise CheckpointError(
        f"{path}: is no checkpoint (expected config.json with model.safetensors, or checkpoints/); it holds {there}"
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _weights_in(folder: Path) -> dict[str, Tensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return load_tensors(single)
    if index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise CheckpointError(f"{index}: names a file outside the folder")
        return {name: tensor for file in files for name, tensor in load_tensors(folder / file).items()}
    there = sorted(child.name for child in folder.iterdir())[:8]
    raise CheckpointError(
        f"{folder}: holds no model.safetensors (there is {there}); pickles are not read, save safetensors"
    )


def load_weights(model: GPT, state: dict[str, Tensor], where: Path | str) -> None:
    """Copy tensors into a model by name. Raises CheckpointError for a missing, left-over or misshapen one."""
    parameters = dict(model.named_parameters())
    if missing := sorted(set(parameters) - set(state)):
        raise CheckpointError(f"{where}: lacks the tensors {missing[:4]}")
    if extra := sorted(set(state) - set(parameters)):
        raise CheckpointError(f"{where}: holds tensors this model has no place for: {extra[:4]}")
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, the config says {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def empty_model(config: GPTConfig, *, dtype: torch.dtype, device: torch.device | str) -> GPT:
    """A GPT whose weights are yet to be loaded: allocated, not initialised, no random number drawn."""
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device).to(dtype)
    if model.config.tie_embeddings:
        model.tie()
    for module in model.modules():
        if isinstance(module, Rotary):
            module.reset_buffers()
    return model


def load(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Run:
    """Load a model with its tokenizer from a run, a checkpoint folder, or a Hugging Face GPT-2 or Llama folder.

    A folder with a manifest is verified first; of a run the newest checkpoint that verifies is taken. Never touches the
    network, never runs code from the folder. The model comes back in evaluation mode.

    Raises CheckpointError for a folder that holds no model, a damaged one, or an unknown architecture.
    """
    from minigpt.terminal import notice

    folder = find_checkpoint(path, notice)
    if (folder / MANIFEST).is_file():
        verify(folder)
    config, weights = read_weights(folder)
    model = empty_model(config, dtype=dtype, device=device)
    load_weights(model, weights, folder)
    generation = folder / "generation_config.json"
    train_config = folder / "train_config.yaml"
    return Run(
        model=model.eval(),
        tokenizer=load_tokenizer(folder),
        config=yaml.safe_load(train_config.read_text(encoding="utf-8")) if train_config.is_file() else {},
        sampling=_read_json(generation) if generation.is_file() else {},
        path=folder,
    )


def read_config(folder: Path) -> GPTConfig:
    """The model's config, without its weights. Raises CheckpointError, naming the file, for one that makes no model."""
    path = folder / "config.json"
    values = _read_json(path)
    try:
        if "minigpt" in values:
            return GPTConfig.from_dict({key: value for key, value in values["minigpt"].items() if key != "format"})
        return config_from_huggingface(values, str(path))
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: describes no model that can be made ({error})") from error


def read_weights(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and tensors, under our names, of a checkpoint or Hugging Face folder."""
    config, weights = read_config(folder), _weights_in(folder)
    values = _read_json(folder / "config.json")
    if values.get("model_type") != "minigpt":
        weights = from_huggingface(values, config, weights, str(folder / "config.json"))
    return config, weights


def read_training_state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises CheckpointError where it was not saved to be resumed."""
    path = folder / "training_state.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds weights but no training state, so it cannot be resumed")
    state = _read_json(path)
    if state.pop("format", FORMAT) > FORMAT:
        raise CheckpointError(f"{path}: was written by a newer version; update minigpt-lab")
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path}: step is {state.get('step')!r}; a whole number was expected")
    return state


def read_training_tensors(folder: Path) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint."""
    return load_tensors(folder / "training_state.safetensors")
