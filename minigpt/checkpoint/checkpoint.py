"""Loading a checkpoint: a folder with weights, config, tokenizer, sampling defaults and training state.

    step-00000500/
        model.safetensors, config.json      Hugging Face's layout where it can hold the model, else our own names
        minigpt_tokenizer.json              the tokenizer
        generation_config.json              sampling defaults
        train_config.yaml                   the resolved config of the run that wrote it
        logits.json                         the logits of a dozen ids, computed again on loading
        training_state.safetensors, .json   optimizer moments by parameter name (raw weights beside averages), counters
        manifest.json                       size and sha256 of every file, written last

It is written to a temporary sibling, synced, renamed and read back; only then are older ones pruned. So at any moment,
whatever is killed or fills up, the last good checkpoint is whole. Nothing in it is a pickle: reading one runs no code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minigpt.checkpoint.filling import filled_model, load_weights
from minigpt.checkpoint.foreign import read_sampling, reconciled
from minigpt.checkpoint.formats import FORMAT, check_format, migrate_model
from minigpt.checkpoint.identity import check_logits, refuse_other_classes
from minigpt.checkpoint.manifest import MANIFEST, read_json, verify_once
from minigpt.checkpoint.metrics import MetricsTable
from minigpt.checkpoint.runs import read_checkpoint, read_metrics
from minigpt.checkpoint.tensors import load_tensors, refuse_nonfinite
from minigpt.checkpoint.weights import (
    config_from_huggingface,
    from_huggingface,
    untied_where_they_differ,
)
from minigpt.choices import UnknownChoice
from minigpt.durable import read_text
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.model.config import GPTConfig
from minigpt.model.device import pick_device
from minigpt.model.gpt import GPT
from minigpt.plugins import naming
from minigpt.terminal import notice, notice_once
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.build import load_tokenizer

MOST_YAML = 1 << 18  # bytes


@dataclass
class Loaded:
    """A checkpoint that was read."""

    model: GPT
    tokenizer: Tokenizer
    config: dict[str, Any]
    """The resolved training config; empty where the folder holds none (a Hugging Face folder)."""
    stored_sampling: dict[str, Any]
    """generation_config.json: sampling defaults, as stored."""
    path: Path
    """The checkpoint folder that was read. Of a run in training it may be gone by now; nothing more is read from it."""
    state: dict[str, Any] = field(default_factory=dict)
    """training_state.json: the counters of training, the hash of the corpus; empty where the folder holds none."""

    @property
    def folder(self) -> Path:
        """The run's folder, runs/NAME; the checkpoint folder itself if it is not part of a run."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path

    @property
    def metrics(self) -> MetricsTable:
        """The rows of metrics.jsonl as a table; empty if the model has no run."""
        return MetricsTable(read_metrics(self.folder / "metrics.jsonl"))


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


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    model: Callable[[GPTConfig], GPT] | None = None,
) -> Loaded:
    """Load a checkpoint; see `minigpt.sampling.run.load`, which returns a `Run`."""
    return read_checkpoint(path, lambda folder: _load(folder, device, dtype, folder == Path(path), model), notice)


def _load(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    lazily: bool,
    make: Callable[[GPTConfig], GPT] | None,
) -> Loaded:
    if (folder / MANIFEST).is_file():
        verify_once(folder)
    if (folder / "adapter_config.json").is_file():
        notice_once(f"{folder}: holds an adapter (adapter_config.json), which is not applied; merge it first")
    config, weights = read_weights(folder)
    if not lazily:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    device = pick_device() if device == "auto" else device
    if make is None:
        refuse_other_classes(_needs(folder), folder)
        model = filled_model(config, weights, folder, dtype=dtype, device=device)
    else:
        model = make(config).to(dtype=dtype, device=device)
        load_weights(model, weights, folder)
    check_logits(model.eval(), folder)
    tokenizer = _read_tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:
        notice_once(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids and its model {model.vocab_size}; "
            f"ids from {model.vocab_size} on cannot be read"
        )
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        config=read_yaml(folder / "train_config.yaml") if (folder / "train_config.yaml").is_file() else {},
        stored_sampling=read_sampling(folder, model.vocab_size),
        path=folder,
        state=read_training_state(folder) if (folder / "training_state.json").is_file() else {},
    )


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
            ours.pop("needs", None)
            written = check_format(ours.pop("format", FORMAT), str(path))
            config = GPTConfig.from_dict(migrate_model(ours, written))
            return config if values.get("model_type") == "minigpt" else reconciled(config, values, str(path))
        return config_from_huggingface(values, str(path))
    except UnknownChoice as error:
        raise CheckpointError(f"{path}: {_with_plugins(error, folder)}") from error
    except (ConfigError, AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a valid model ({error})") from error


def _needs(folder: Path) -> dict[str, Any]:
    """What a checkpoint says that it needs besides its config; plain values, of which nothing is imported."""
    ours = read_json(folder / "config.json").get("minigpt")
    needs = ours.get("needs") if isinstance(ours, dict) else None
    return needs if isinstance(needs, dict) else {}


def _with_plugins(error: UnknownChoice, folder: Path) -> str:
    """The message about an unknown part, with the plug-ins of the run or the modules that the checkpoint names."""
    path = folder / "train_config.yaml"
    plugins = read_yaml(path).get("plugins") if path.is_file() else None
    parts = _needs(folder).get("parts")
    named = plugins or (sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else [])
    try:
        with naming(named):
            raise error
    except UnknownChoice as told:
        return str(told)


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
