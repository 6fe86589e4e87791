"""Save a checkpoint: write to a temporary folder, sync, compare with memory, rename, read back."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from minigpt.checkpoint.formats import FORMAT
from minigpt.checkpoint.identity import FILE as LOGITS
from minigpt.checkpoint.identity import needs_of, to_store
from minigpt.checkpoint.manifest import verify, write_manifest
from minigpt.checkpoint.tensors import check_written, refuse_nonfinite, write_tensors
from minigpt.checkpoint.weights import (
    to_huggingface,
)
from minigpt.durable import check_space, disk_errors, sync, to_json
from minigpt.errors import CheckpointError
from minigpt.model.gpt import GPT
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.build import save_tokenizer

SMALL_FILES = 1 << 20  # bytes that are allowed for what is no tensor, where space is asked for


def state_of(model: GPT) -> dict[str, Tensor]:
    """The model's tensors by name, a shared one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_checkpoint(
    folder: Path | str,
    model: GPT,
    tokenizer: Tokenizer,
    *,
    weights: dict[str, Tensor] | None = None,
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
        weights: tensors by parameter name to be written in place of the model's own, such as averaged ones.
        sampling: generation_config.json.
        train_config: the resolved config, plain values.
        state: counters of training, JSON-able; None for a checkpoint that is not to be resumed.
        state_tensors: optimizer moments and the like, by name.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; nothing was written.
        DiskError: the disk is full, read-only or failing; nothing at `folder` then, older checkpoints untouched.
        CheckpointError: what was written does not read back as it was.
    """
    folder = Path(folder)
    own = weights or state_of(model)
    refuse_nonfinite({**own, **(state_tensors or {})}, f"{folder}: not saved")
    layout = to_huggingface(model.config, own)
    hf_config, tensors = layout or ({"model_type": "minigpt", "architectures": ["GPT"]}, own)
    config = {**hf_config, "minigpt": {"format": FORMAT, **model.config.to_dict()}}
    if needs := needs_of(model):
        config["minigpt"]["needs"] = needs
    if tokenizer.eot is not None:
        config["bos_token_id"] = config["eos_token_id"] = tokenizer.eot

    needed = sum(t.numel() * t.element_size() for t in (*tensors.values(), *(state_tensors or {}).values()))
    needed += SMALL_FILES
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    with disk_errors(str(folder), needed=needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        check_space(folder, needed)
        temporary.mkdir()
    try:
        with disk_errors(str(folder), needed=needed):
            write_tensors(temporary / "model.safetensors", tensors)
            (temporary / "config.json").write_text(to_json(config), encoding="utf-8")
            (temporary / LOGITS).write_text(to_json(to_store(model, own)), encoding="utf-8")
            save_tokenizer(tokenizer, temporary)
            (temporary / "generation_config.json").write_text(to_json(sampling or {}), encoding="utf-8")
            if train_config is not None:
                text = yaml.safe_dump(train_config, sort_keys=False, allow_unicode=True)
                (temporary / "train_config.yaml").write_text(text, encoding="utf-8")
            if state is not None:
                write_tensors(temporary / "training_state.safetensors", state_tensors or {})
                (temporary / "training_state.json").write_text(to_json({"format": FORMAT, **state}), encoding="utf-8")
            for path in temporary.iterdir():
                sync(path)
            check_written(temporary / "model.safetensors", tensors)
            if state is not None:
                check_written(temporary / "training_state.safetensors", state_tensors or {})
            write_manifest(temporary)
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
