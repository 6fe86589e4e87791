"""A checkpoint is a folder, complete by itself: weights, config, tokenizer, sampling defaults, training state.

    step-00000500/
        model.safetensors, config.json      Hugging Face's layout where it can hold the model, else our own names
        minigpt_tokenizer.json              the tokenizer
        generation_config.json              sampling defaults
        train_config.yaml                   the resolved config of the run that wrote it
        training_state.safetensors, .json   optimizer moments by parameter name (raw weights beside averages), counters
        manifest.json                       size and sha256 of every file, written last

It is written to a temporary sibling, synced, renamed and read back; only then are older ones pruned. So at any moment,
whatever is killed or fills up, the last good checkpoint is whole. Nothing in it is a pickle: reading one runs no code.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from minigpt.checkpoint.filling import check_weights as check_weights
from minigpt.checkpoint.filling import empty_model as empty_model
from minigpt.checkpoint.filling import filled_model
from minigpt.checkpoint.filling import load_weights as load_weights
from minigpt.checkpoint.foreign import reconciled, sampling_from_huggingface
from minigpt.checkpoint.formats import FORMAT, check_format, migrate_model
from minigpt.checkpoint.runs import MANIFEST, read_checkpoint, read_json, verify, verify_once, write_manifest
from minigpt.checkpoint.weights import (
    config_from_huggingface,
    from_huggingface,
    to_huggingface,
    untied_where_they_differ,
)
from minigpt.durable import check_space, disk_errors, read_text, sync, to_json
from minigpt.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from minigpt.model.config import GPTConfig
from minigpt.model.device import pick_device
from minigpt.model.gpt import GPT
from minigpt.terminal import notice, notice_once
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.build import load_tokenizer, save_tokenizer

MOST_YAML = 1 << 18  # bytes
SMALL_FILES = 1 << 20  # bytes that are allowed for what is no tensor, where space is asked for


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
    """The checkpoint folder that was read. Of a run in training it may be gone by now; nothing more is read from it."""
    state: dict[str, Any] = field(default_factory=dict)
    """training_state.json: the counters of training, the hash of the corpus; empty where the folder holds none."""


# Writing.


def state_of(model: GPT) -> dict[str, Tensor]:
    """The model's tensors by name, a shared one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_checkpoint(
    folder: Path,
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
    own = weights or state_of(model)
    refuse_nonfinite({**own, **(state_tensors or {})}, f"{folder}: not saved")
    layout = to_huggingface(model.config, own)
    hf_config, tensors = layout or ({"model_type": "minigpt", "architectures": ["GPT"]}, own)
    config = {**hf_config, "minigpt": {"format": FORMAT, **model.config.to_dict()}}
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
            for path in temporary.iterdir():
                sync(path)
            _compare(temporary / "model.safetensors", tensors)
            if state is not None:
                _compare(temporary / "training_state.safetensors", state_tensors or {})
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


def refuse_nonfinite(tensors: dict[str, Tensor], what: str) -> None:
    """Raise NonFiniteError, naming the tensor, where one holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{what}, since {name} holds NaN or infinity; go on from an earlier checkpoint")


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


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt", **(metadata or {})})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file whole or not at all; `load_tensors` and `load_metadata` read it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(str(path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_tensors(temporary, tensors, metadata)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    """What lies on the disk must be what is in memory: a hash of the file alone would only seal what went wrong."""
    with safetensors.safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name), tensor.detach().cpu()):
                raise CheckpointError(f"{path}: {name} does not read back as it was written; check the disk")


# Reading.


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def load_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself. Raises CheckpointError where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _weights_in(folder: Path) -> dict[str, Tensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return load_tensors(single)
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(f"{index}: weight_map is no table of tensor and file names; copy the folder again")
        files = sorted(set(named.values()))
        if any(Path(name).name != name for name in files):
            raise CheckpointError(f"{index}: names a file outside the folder; a plain file name was expected")
        return {name: tensor for file in files for name, tensor in load_tensors(folder / file).items()}
    there = sorted(child.name for child in folder.iterdir())[:8]
    raise CheckpointError(
        f"{folder}: holds no model.safetensors (there is {there}); pickles are not read, save safetensors"
    )


def load(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Run:
    """Load a model with its tokenizer from a run, a checkpoint folder, or a Hugging Face GPT-2 or Llama folder.

    Of a run the checkpoint that validated best is taken, where one is recorded and whole, else the newest that is; a
    notice says so where that is not the newest. The run may be in training: see `runs.read_checkpoint`. A
    folder with a manifest is verified first. Never touches the network, never runs code from the folder. The model
    comes back in evaluation mode, on `device`; "auto" is a GPU where there is one (see `minigpt.model.device`). The
    weights of a run are read at once, as its checkpoints are pruned while it trains. Those of a folder named itself
    are, on a CPU, the file's pages, read when they are first used and private to the process: training does not write
    to the file, but the file should not be overwritten in place meanwhile.

    What a Hugging Face folder asks for is done, refused by name, or named in a notice: docs/interop.md.

    Raises CheckpointError for a folder that holds no model, a damaged one, or an unknown architecture.
    """
    return read_checkpoint(path, lambda folder: _load(folder, device, dtype, lazily=folder == Path(path)), notice)


def _load(folder: Path, device: torch.device | str, dtype: torch.dtype, lazily: bool) -> Run:
    if (folder / MANIFEST).is_file():
        verify_once(folder)
    if (folder / "adapter_config.json").is_file():
        notice_once(f"{folder}: holds an adapter (adapter_config.json), which is not applied; merge it first")
    config, weights = read_weights(folder)
    if not lazily:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    device = pick_device() if device == "auto" else device
    model = filled_model(config, weights, folder, dtype=dtype, device=device)
    tokenizer = _read_tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:
        notice_once(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids and its model {model.vocab_size}; "
            f"ids from {model.vocab_size} on cannot be read"
        )
    return Run(
        model=model.eval(),
        tokenizer=tokenizer,
        config=read_yaml(folder / "train_config.yaml") if (folder / "train_config.yaml").is_file() else {},
        sampling=_read_sampling(folder, model.vocab_size),
        path=folder,
        state=read_training_state(folder) if (folder / "training_state.json").is_file() else {},
    )


def _read_sampling(folder: Path, vocab_size: int) -> dict[str, Any]:
    path, values = folder / "generation_config.json", read_json(folder / "config.json")
    stored = read_json(path) if path.is_file() else None
    if "minigpt" in values:
        return stored or {}
    return sampling_from_huggingface(values, stored, vocab_size, str(folder))


def _read_tokenizer(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{folder}: its tokenizer cannot be made ({error!r}); copy the folder again") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A small YAML mapping of plain values, without tags and references. Raises CheckpointError for anything else."""
    try:
        text, depth = read_text(path, MOST_YAML), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # one by one: deep nesting takes time by its square
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 20 or isinstance(event, yaml.AliasEvent):
                raise ValueError("it is nested deeply, or refers to parts of itself")
        values = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no mapping; copy it again")
    return values


def read_config(folder: Path) -> GPTConfig:
    """The model's config, without its weights. Raises CheckpointError, naming the file, for one that makes no model."""
    path = folder / "config.json"
    values = read_json(path)
    try:
        if "minigpt" in values:
            ours = dict(values["minigpt"])
            written = check_format(ours.pop("format", FORMAT), str(path))
            config = GPTConfig.from_dict(migrate_model(ours, written))
            return config if values.get("model_type") == "minigpt" else reconciled(config, values, str(path))
        return config_from_huggingface(values, str(path))
    except (ConfigError, AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a valid model ({error})") from error


def read_weights(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and tensors, under our names, of a checkpoint or Hugging Face folder."""
    config, weights = read_config(folder), _weights_in(folder)
    path = folder / "config.json"
    if config.n_layer > len(weights):
        raise CheckpointError(f"{path}: n_layer is {config.n_layer}, but the weights are {len(weights)} tensors")
    values = read_json(path)
    try:
        if values.get("model_type") != "minigpt":
            config = untied_where_they_differ(values, config, weights, str(path))
            weights = from_huggingface(values, config, weights, str(path))
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its weights do not fit it ({' '.join(str(error).split())})") from error
    return config, weights


def read_training_state(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises CheckpointError where it was not saved to be resumed."""
    path = folder / "training_state.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds weights but no training state, so it cannot be resumed")
    state = read_json(path)
    check_format(state.pop("format", FORMAT), str(path))
    for name, kind, what in (("step", int, "a whole number"), ("seconds", (int, float), "a number")):
        if not isinstance(state.get(name, 0), kind) or isinstance(state.get(name), bool) or state.get(name, 0) < 0:
            raise CheckpointError(f"{path}: {name} is {state.get(name)!r}; {what} was expected")
    if "step" not in state or not isinstance(state.get("environment", {}), dict):
        raise CheckpointError(f"{path}: names no step, or no environment; use an earlier checkpoint")
    return state


def read_training_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of training: optimizer state as "<key>/<parameter>", raw weights as "raw/<parameter>".

    Raises NonFiniteError where one holds NaN or infinity.
    """
    tensors = load_tensors(folder / "training_state.safetensors")
    refuse_nonfinite(tensors, f"{folder}: cannot be resumed")
    return tensors
