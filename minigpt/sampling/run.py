"""`load` and `Run`: a model with its tokenizer and its sampling settings, and a sampler for it.

run = minigpt.load("runs/mine")
run.sampler().generate("Once upon a time")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt.checkpoint import checkpoint
from minigpt.checkpoint.checkpoint import Loaded
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.sampling.stored import stored_settings

if TYPE_CHECKING:
    from minigpt.sampling.sampler import Sampler


@dataclass
class Run(Loaded):
    """What `load` returns: everything needed to sample from a model or to study it."""

    @property
    def sampling(self) -> SamplingConfig:
        """The checkpoint's own sampling settings, from its generation_config.json.

        Raises ConfigError, naming the file, for a value that is refused.
        """
        return stored_settings(self)

    def sampler(self, config: Any = None, *, fast: bool = True, **overrides: Any) -> Sampler:
        """A sampler for this model, with the checkpoint's own settings.

        Args:
            config: settings in place of the checkpoint's; a dict replaces only the fields that it has.
            fast: decode with a copy of the model that is laid out for it (see `minigpt.fast`); later changes of the
                model do not reach the copy.
            overrides: fields of `SamplingConfig`.
        """
        from minigpt.sampling.sampler import Sampler

        return Sampler.of(self, config, fast=fast, **overrides)


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    model: Callable[[GPTConfig], GPT] | None = None,
) -> Run:
    """Load a model with its tokenizer from a run, a checkpoint folder, or a Hugging Face GPT-2 or Llama folder.

    Of a run the checkpoint that validated best is taken, where one is recorded and whole, else the newest that is; a
    notice says so where that is not the newest. The run may be in training: see `runs.read_checkpoint`. A
    folder with a manifest is verified first. Never touches the network, never runs code from the folder. The model
    comes back in evaluation mode, on `device`; "auto" is a GPU where there is one (see `minigpt.model.device`). The
    weights of a run are read at once, as its checkpoints are pruned while it trains. Those of a folder named itself
    are, on a CPU, the file's pages, read when they are first used and private to the process: training does not write
    to the file, but the file should not be overwritten in place meanwhile.

    What a Hugging Face folder asks for is done, refused by name, or named in a notice: docs/interop.md.

    A checkpoint whose model has parts of plug-ins needs them registered before (see minigpt.register); it names the
    modules that the run used and never imports them. A model of classes that its config does not describe, such as a
    subclass of GPT, needs `model`: a function that makes one from the config. The loaded model must compute the logits
    that were stored with it.

    Raises CheckpointError for a folder that holds no model, a damaged one, an unknown architecture, or another model.
    """
    return Run(**vars(checkpoint.load(path, device=device, dtype=dtype, model=model)))
