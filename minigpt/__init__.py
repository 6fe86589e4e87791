"""minigpt: train a small GPT on your own text, sample from it, study how it works.

    import minigpt

    run = minigpt.load("runs/NAME")
    print(run.sampler().generate("Once upon a time")[0][0].text)
    minigpt.Study(run).loss("Once upon a time")

Public names are imported on first use, so `import minigpt` alone loads neither torch nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Batches": "minigpt.data.batches",
    "DataConfig": "minigpt.data.config",
    "GPT": "minigpt.model.gpt",
    "GPTConfig": "minigpt.model.config",
    "MinigptError": "minigpt.errors",
    "Run": "minigpt.sampling.run",
    "Sampler": "minigpt.sampling.sampler",
    "SamplingConfig": "minigpt.sampling.settings.config",
    "Study": "minigpt.internals.study",
    "TokenizerConfig": "minigpt.tokenizer.config",
    "TrainConfig": "minigpt.training.config",
    "fast": "minigpt.model.fast",
    "load": "minigpt.sampling.run",
    "next_token_loss": "minigpt.training.recipe.loss",
    "prepare": "minigpt.data.prepare",
    "register": "minigpt.plugins",
    "save_checkpoint": "minigpt.checkpoint.saving",
    "train": "minigpt.training.train",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from minigpt.checkpoint.saving import save_checkpoint as save_checkpoint
    from minigpt.data.batches import Batches as Batches
    from minigpt.data.config import DataConfig as DataConfig
    from minigpt.data.prepare import prepare as prepare
    from minigpt.errors import MinigptError as MinigptError
    from minigpt.internals.study import Study as Study
    from minigpt.model.config import GPTConfig as GPTConfig
    from minigpt.model.fast import fast as fast
    from minigpt.model.gpt import GPT as GPT
    from minigpt.plugins import register as register
    from minigpt.sampling.run import Run as Run
    from minigpt.sampling.run import load as load
    from minigpt.sampling.sampler import Sampler as Sampler
    from minigpt.sampling.settings.config import SamplingConfig as SamplingConfig
    from minigpt.tokenizer.config import TokenizerConfig as TokenizerConfig
    from minigpt.training.config import TrainConfig as TrainConfig
    from minigpt.training.recipe.loss import next_token_loss as next_token_loss
    from minigpt.training.train import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minigpt' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
