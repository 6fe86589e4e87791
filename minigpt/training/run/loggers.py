"""The trackers of `--log`: functions (run folder, config) -> Lightning logger, with a `check` before the run.

A missing package is an error before the run starts. After that, a tracker never blocks or stops a run.
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
from minigpt.training.config import LOGGERS, TrainConfig


def wandb_key_is_known() -> bool:
    """Whether wandb starts without asking for a key: WANDB_MODE is set, or a key is in the environment or netrc."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_tracker(config: TrainConfig) -> None:
    """Raise MissingExtra, before the run starts, if the package of the requested tracker is missing."""
    getattr(LOGGERS[config.log], "check", lambda: None)()


def make_loggers(config: TrainConfig, run: Path, rank: int) -> list[Any] | bool:
    """Create Lightning's logger for `--log`, on process 0 only; False for none.

    If a logger cannot be created, a notice says so and training continues without it.
    """
    if rank != 0:
        return False
    try:
        logger = LOGGERS[config.log](run, config)
    except Exception as error:  # a tracker must never stop a run, whatever it raises
        notice(f"--log {config.log} cannot be used ({error}); metrics are still written to metrics.jsonl")
        return False
    return False if logger is None else [logger]


def no_logger(run: Path, config: TrainConfig) -> None:
    """Only metrics.jsonl."""


def tensorboard(run: Path, config: TrainConfig) -> Any:
    """Lightning's logger for TensorBoard, in the run's folder."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(run, name="", version="tensorboard")


def _check_tensorboard() -> None:
    if find_spec("tensorboardX") is None:  # Lightning supports both packages
        imported("tensorboard", "tensorboard", "log: tensorboard")


def wandb(run: Path, config: TrainConfig) -> Any:
    """Lightning's logger for wandb.

    The wandb run id is stored in the run's folder before training starts, so that a resumed run continues the wandb
    run. Without an API key, wandb logs offline into the run's folder.
    """
    stored = run / "wandb.json"
    if not stored.is_file():
        write_text(stored, to_json({"id": secrets.token_hex(4)}))
    return _wandb_logger(run, config, json.loads(stored.read_text(encoding="utf-8"))["id"])


tensorboard.check = _check_tensorboard  # type: ignore[attr-defined]
wandb.check = lambda: imported("wandb", "", "log: wandb")  # type: ignore[attr-defined]


def _wandb_logger(run: Path, config: TrainConfig, run_id: str) -> Any:
    """Start a wandb run; offline if there is no key or the server does not answer."""
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
            assert logger.experiment is not None  # the wandb run starts here, not in the constructor
        except Exception as error:  # no server, unknown project, invalid key: wandb has several exception types
            if offline:
                raise
            notice(f"--log wandb: the server cannot be used ({error}); logging offline to {run / 'wandb'}")
        else:
            return logger
    raise AssertionError("unreachable")


def finish(loggers: list[Any]) -> None:
    """Let wandb send its remaining data now; by itself it waits for interpreter exit, which worker processes skip."""
    for logger in loggers:
        if hasattr(logger.experiment, "finish"):
            logger.experiment.finish()
