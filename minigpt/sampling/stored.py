"""The sampling settings that a checkpoint brings."""

from __future__ import annotations

from pathlib import Path

from minigpt.checkpoint.checkpoint import Loaded
from minigpt.sampling.settings.config import SamplingConfig


def stored_settings(loaded: Loaded) -> SamplingConfig:
    """The settings in generation_config.json. Raises ConfigError, naming the file, for a value that is refused."""
    return SamplingConfig.from_dict(loaded.stored_sampling, sampling_file(loaded.path))


def sampling_file(folder: Path) -> str:
    """The file that the sampling settings of a folder are in."""
    own = folder / "generation_config.json"
    return str(own if own.is_file() else folder / "config.json")
