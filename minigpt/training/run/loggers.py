"""The loggers selected by `--log` (wandb, tensorboard), as Lightning loggers.

A missing package is an error before the run begins. After that, a failing logger never blocks or stops a run.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from minigpt.durable import to_json, write_text
from minigpt.errors import imported
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig


def wandb_key_is_known() -> bool:
    """Whether wandb can log in without a prompt: WANDB_MODE is set, or an API key is in the environment or netrc."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_tracker(config: TrainConfig) -> None:
    """Raise MissingExtra if the package of the logger selected by `--log` is missing."""
    if config.log == "wandb":
        imported("wandb", "", "log: wandb")
    elif config.log == "tensorboard" and find_spec("tensorboardX") is None:  # Lightning writes through either
        imported("tensorboard", "tensorboard", "log: tensorboard")


def make_loggers(config: TrainConfig, run: Path, rank: int) -> list[Any] | bool:
    """Create the Lightning logger for `--log` on the first process; return False on others and for "none".

    The wandb run id is stored in the run's folder before training begins, so that a resumed run continues it. Without
    an API key wandb works offline, in the run's folder. If a logger cannot be created, prints a notice and returns
    False.
    """
    if config.log == "none" or rank != 0:
        return False
    try:
        if config.log == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return [TensorBoardLogger(run, name="", version="tensorboard")]
        stored = run / "wandb.json"
        if not stored.is_file():
            write_text(stored, to_json({"id": secrets.token_hex(4)}))
        return [_wandb_logger(run, config, json.loads(stored.read_text(encoding="utf-8"))["id"])]
    except Exception as error:  # a logger must never stop a run, whatever it raises
        notice(f"--log {config.log} cannot be used ({error}); metrics are still written to metrics.jsonl")
        return False


def _wandb_logger(run: Path, config: TrainConfig, run_id: str) -> Any:
    """Start a wandb run; offline if there is no API key or the server does not respond."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    for offline in (False, True) if wandb_key_is_known() else (True,):
        logger = WandbLogger(
            project=os.environ.get("WANDB_PROJECT", "minigpt"),
            name=run.name,
            id=run_id,
            save_dir=run,
            offline=offline,
            config=config.to_dict(),
            settings=wandb.Settings(save_code=False, x_disable_meta=True, init_timeout=30, silent=True),
        )
        try:
            assert logger.experiment is not None  # this access starts the run, not the constructor
        except Exception as error:  # wandb's own types: no server, unknown project, rejected key
            if offline:
                raise
            notice(f"--log wandb: cannot use the server ({error}); logging offline to {run / 'wandb'}")
        else:
            return logger
    raise AssertionError("unreachable")


def finish(loggers: list[Any]) -> None:
    """Flush wandb. It would otherwise flush at interpreter exit, which multi-process runs skip (see errors.leave)."""
    for logger in loggers:
        if hasattr(logger.experiment, "finish"):
            logger.experiment.finish()
