"""Decide once what several processes must agree on: corpus, run name, folder, checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from minigpt.checkpoint.checkpoint import read_training_state, read_yaml
from minigpt.checkpoint.formats import migrate_training
from minigpt.checkpoint.pruning import make_ready
from minigpt.checkpoint.runs import checkpoints_of, newest_valid, read_best, step_of
from minigpt.data.batches import Batches
from minigpt.data.prepare import prepare
from minigpt.data.shards import Corpus
from minigpt.durable import disk_errors, locked, write_text
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig, flatten
from minigpt.training.plan.choose import choose
from minigpt.training.run.each_step import due
from minigpt.training.run.job import Job
from minigpt.training.run.loggers import check_tracker
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.standing import Standing, settle_best, standing_at

# A run with other values here is another run. (Tokenizer and text are held by the hash of the tokens.) Losses
# of validation on other tokens cannot be compared, and which checkpoint is the best could not be told.
FIXED = ("model.", "data.order", "batch.tokens", "seed", "optimizer.name", "eval.tokens")
NOT_COMPARED = ("run_name", "runs_dir", "resume")


def settle(
    config: TrainConfig,
    held: ExitStack,
    plan: Callable[[Job], TrainConfig] | None = None,
    given: Corpus | None = None,
) -> Job:
    """Prepare the corpus, fill in what depends on it, settle name and checkpoint, and write the run's config.yaml.

    Args:
        config: as the user gave it.
        held: takes the lock on the run's folder; closing it lets the run go.
        given: the corpus, prepared from a script's documents; None: prepared from config.data.
        plan: decides what only a probe can tell of a new run: trainer.compile and the steps that fill its minutes.

    Raises:
        ConfigError, DataError, CheckpointError, DiskError: the run cannot start; nothing was changed.
    """
    config.check()
    _check_devices(config)
    check_tracker(config)
    trained_on = _trained_on(config)
    same = trained_on is not None and _same_text(config)
    corpus = given or prepare(config.data, config.tokenizer, trained_on=trained_on if same else None)
    corpus.verify()
    if trained_on is not None:  # before what fails only because the text is another
        _refuse_another(config, corpus, trained_on)
    vocab_size = config.model.vocab_size or corpus.tokenizer.vocab_size
    if vocab_size < corpus.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is less than the tokenizer's {corpus.tokenizer.vocab_size}; leave it out"
        )
    Batches(corpus.train, config.model.block_size, config.batch_size, config.seed, config.data.order)  # long enough?
    run = _folder_of(config)
    config = replace(config, run_name=run.name, model=replace(config.model, vocab_size=vocab_size))
    with disk_errors(str(run), "or choose another --runs_dir"):
        run.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(run))

    config = choose(_keep_decisions(config, run))
    start = _checkpoint_to_resume(config, run, corpus)
    first_step = read_training_state(start)["step"] if start else 0
    standing = standing_at(first_step, read_metrics(run / "metrics.jsonl"), read_best(run))
    owed = _owed(config, run, first_step, len(corpus.val) > 1, standing)
    job = Job(config, run, corpus.folder, start, first_step, owed, standing)
    if first_step > config.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps: {config.trainer.max_steps} is less than the {first_step} steps that {run} has done"
        )
    if not job.finished:
        make_ready(run)
        settle_best(run, standing, first_step)
        if plan is not None and not _stored_config(run).is_file():
            config = plan(job)
            job = replace(job, config=config)
        stored = replace(config, resume="auto").to_dict()
        write_text(run / "config.yaml", yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
    return job


def _check_devices(config: TrainConfig) -> None:
    import torch

    wanted, devices = config.trainer.accelerator, config.trainer.devices
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "gpu" and not gpus:
        raise ConfigError("trainer.accelerator: gpu, but torch sees none here; choose cpu or auto")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("trainer.accelerator: mps, but torch sees none here; choose cpu or auto")
    if wanted in ("auto", "gpu") and 0 < gpus < devices:
        raise ConfigError(f"trainer.devices: {devices}, but there are {gpus} GPUs here; give at most {gpus}")


def _folder_of(config: TrainConfig) -> Path:
    """runs/NAME; without a name a new folder, named after the corpus and the time."""
    runs = Path(config.runs_dir)
    if config.run_name is not None:
        run = runs / config.run_name
        if config.resume == "must" and not run.is_dir():  # before it is made
            raise CheckpointError(f"{run}: no run to resume there (--resume must); check --run_name and --runs_dir")
        return run
    if config.resume == "must":
        raise ConfigError("run_name: --resume must needs one; name the run to resume")
    source = re.sub(r"[^\w.-]+", "-", Path(config.data.source).stem).strip("-.") or "run"
    name = f"{source}-{datetime.now():%Y%m%d-%H%M%S}"
    for again in range(1, 1000):
        run = runs / (name if again == 1 else f"{name}-{again}")
        try:
            with disk_errors(str(runs), "or choose another --runs_dir"):
                runs.mkdir(parents=True, exist_ok=True)
            run.mkdir()
        except FileExistsError:
            continue
        return run
    raise ConfigError(f"runs_dir: {runs} holds a thousand runs named {name}; give a --run_name")


def _stored_config(run: Path) -> Path:
    """Where the config of a run is stored; every checkpoint carries it too."""
    path = run / "config.yaml"
    return path if path.is_file() else max(run.glob("checkpoints/step-*/train_config.yaml"), default=path)


def _keep_decisions(config: TrainConfig, run: Path) -> TrainConfig:
    """What was decided when a run began stays: precision, compilation, and the steps that its `minutes` gave it."""
    stored = _stored_config(run)
    if config.resume == "never" or not stored.is_file():
        return config
    before = TrainConfig.from_dict(_read_config(stored))
    if config.trainer.precision == "auto":
        config = replace(config, trainer=replace(config.trainer, precision=before.trainer.precision))
    if config.trainer.compile is None:
        config = replace(config, trainer=replace(config.trainer, compile=before.trainer.compile))
    if config.minutes is None:
        return config
    steps = before.trainer.max_steps
    if config.minutes != before.minutes or config.trainer.max_steps != steps:
        notice(
            f"{run}: its {steps:,} steps were fixed when it began and stay; to continue longer give --minutes null "
            f"--trainer.max_steps N"
        )
    return replace(config, minutes=before.minutes, trainer=replace(config.trainer, max_steps=steps))


def _checkpoint_to_resume(config: TrainConfig, run: Path, corpus: Corpus) -> Path | None:
    stored = run / "config.yaml"
    if not stored.is_file() and not checkpoints_of(run):
        if config.resume == "must":
            raise CheckpointError(f"{run}: no run to resume there (--resume must); check --run_name and --runs_dir")
        return None
    if config.resume == "never":
        raise ConfigError(f"run_name: {run} exists already (--resume never); choose another name")
    start = newest_valid(run, notice)
    if not stored.is_file() and start is not None:  # every checkpoint carries the config too
        stored = start / "train_config.yaml"
    _compare(_read_config(stored), config.to_dict(), run)
    if start is None:
        if config.resume == "must":
            raise CheckpointError(f"{run}: holds no finished checkpoint to resume from (--resume must)")
        if found := checkpoints_of(run):
            raise CheckpointError(
                f"{run}: none of its {len(found)} checkpoints is whole; move it away, or choose another --run_name"
            )
        notice(f"{run}: no checkpoint was finished yet, starting from the first step")
        return None
    state = read_training_state(start)
    if state["step"] != step_of(start):
        raise CheckpointError(f"{start}: was saved at step {state['step']}; give the folder back its name")
    _refuse_another(config, corpus, state.get("corpus"))
    notice(f"resuming {run} from {start.name}")
    return start


def _trained_on(config: TrainConfig) -> str | None:
    """The hash of the corpus that a resumed run was trained on; None for a new run."""
    if config.run_name is None or config.resume == "never":
        return None
    start = newest_valid(Path(config.runs_dir) / config.run_name)
    return read_training_state(start).get("corpus") if start else None


def _same_text(config: TrainConfig) -> bool:
    """Whether a run asks for the text and tokenizer that it began with, wherever they are kept."""
    stored = _stored_config(Path(config.runs_dir) / str(config.run_name))
    if not stored.is_file():
        return False
    before = TrainConfig.from_dict(_read_config(stored))
    data = replace(before.data, folder=config.data.folder, order=config.data.order)
    return (data, before.tokenizer) == (config.data, config.tokenizer)


def _refuse_another(config: TrainConfig, corpus: Corpus, trained_on: Any) -> None:
    if trained_on == corpus.hash:
        return
    run = Path(config.runs_dir) / str(config.run_name)
    stored = _stored_config(run)
    before = _read_config(stored)["data"]["source"] if stored.is_file() else config.data.source
    if before != config.data.source:
        raise DataError(
            f"data.source: {config.data.source} is not the text that {run} was trained on ({before}); leave it out, or "
            f"choose another --run_name"
        )
    raise DataError(
        f"data.source: {config.data.source}, or its tokenizer, has changed since {run} was trained on it (its tokens "
        f"hash to {corpus.hash[:12]}, then {str(trained_on)[:12]}); restore it, or choose another --run_name"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return TrainConfig.from_dict(migrate_training(read_yaml(path))).to_dict()
    except (CheckpointError, ConfigError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); put back the copy that every checkpoint carries (train_config.yaml)"
        ) from error


def _compare(before: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    """Refuse to resume with another model, data order or validation; announce every other change."""
    old, new = flatten(before), flatten(now)
    changed = [key for key in new if key not in NOT_COMPARED and old.get(key) != new[key]]
    fixed = [key for key in changed if key.startswith(FIXED)]
    differences = ", ".join(f"{key} {old.get(key)!r} -> {new[key]!r}" for key in (fixed or changed))
    if fixed:
        raise ConfigError(f"{run}: cannot be resumed with {differences}; choose another --run_name")
    if changed:
        notice(f"{run}: resumes with {differences}")


def _owed(config: TrainConfig, run: Path, step: int, validates: bool, standing: Standing) -> tuple[str, ...]:
    """What was due at the step that a run resumes from, and was cut off."""
    if not step:
        return ()
    owed = []
    if validates and due(step, config.eval.every, config.trainer.max_steps):
        rows = read_metrics(run / "metrics.jsonl")
        if not any(row["step"] == step and "val/loss" in row for row in rows):
            owed.append("validation")
    drawn = (run / "samples" / f"step-{step:08d}.txt").is_file() or not config.sample.max_new_tokens
    ended = standing.exhausted(config.eval.patience)
    if not drawn and (ended or due(step, config.sample.every, config.trainer.max_steps)):
        owed.append("sample")
    return tuple(owed)
