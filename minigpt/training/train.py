"""The training door in Python: a config, or objects of a script, in; a trained run out.

run = minigpt.train(TrainConfig(), documents=["one text", "another"], callbacks=[MyCallback()])
run.metrics["val/loss"]                  numpy array, a row per measurement
minigpt.Sampler(run.model, run.tokenizer).generate("one")
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minigpt.checkpoint.identity import differences
from minigpt.data.given import documents_file, prepare_ids
from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.sampling.run import Run, load
from minigpt.tokenizer.base import Tokenizer
from minigpt.tokenizer.build import save_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from minigpt.tokenizer.given import as_tokenizer
from minigpt.training.config import LOSSES, TrainConfig
from minigpt.training.launch import train as launch
from minigpt.training.run.job import Objects

Loss = Callable[..., Any]


def train(
    config: TrainConfig | None = None,
    *,
    model: GPT | None = None,
    tokenizer: Tokenizer | TokenizerConfig | None = None,
    documents: Iterable[str] | Iterable[Sequence[int]] | None = None,
    callbacks: Sequence[Any] = (),
    losses: Mapping[str, tuple[float, Loss]] | None = None,
) -> Run:
    """Train a run, or resume it if it exists, and return it.

    Args:
        config: all settings; None: the default ones.
        model: a GPT, or a subclass of it, to train in place, from the weights that it has; None: a new one from
            config.model. When a run is resumed, the weights of its newest checkpoint are loaded into it.
        tokenizer: a tokenizer, or its config, instead of config.tokenizer.
        documents: texts, or lists of token ids, instead of config.data.source. They are stored below
            config.data.folder, so that the run can be resumed and evaluated later. Token ids need a `tokenizer` object.
        callbacks: callbacks of Lightning, called after minigpt's; the module that they get has `.model`.
        losses: name -> (weight, function), added to the cross-entropy: (logits (N, V), targets (N)) -> (N) nats.

    Returns:
        The run: the model of the best checkpoint in evaluation mode, its tokenizer, its config and its `metrics`.

    Raises:
        MinigptError: see its subclasses in errors.py; saved checkpoints stay.
    """
    config = config or TrainConfig()
    if model is not None:
        if not isinstance(model, GPT):
            raise ConfigError(f"train: model is {type(model).__name__}; expected a GPT or a subclass of it")
        config = replace(config, model=model.config)
    for name, (weight, function) in (losses or {}).items():
        LOSSES.add(name, function, "", getattr(function, "__module__", "__main__"), {})
        config = replace(config, losses={**config.losses, name: weight})
    chosen = None
    if isinstance(tokenizer, TokenizerConfig):
        config = replace(config, tokenizer=tokenizer)
    elif tokenizer is not None:
        chosen = as_tokenizer(tokenizer)
        path = save_tokenizer(chosen, Path(config.data.folder) / "tokenizers" / chosen.hash[:16])
        config = replace(config, tokenizer=TokenizerConfig(kind="file", path=str(path.parent)))
    corpus = None
    if documents is not None:
        source, is_text = documents_file(documents, config.data)
        config = replace(config, data=replace(config.data, source=str(source), file=None, field="text"))
        if not is_text:
            if chosen is None:
                raise ConfigError("train: documents are token ids, so their tokenizer is needed; give tokenizer=")
            corpus = prepare_ids(source, config.data, chosen)
            source.unlink()  # it is no text: later, the prepared corpus stands for it
    folder = launch(config, Objects(model, tuple(callbacks), corpus))
    own = model is not None and bool(differences(model))
    return load(folder, model=(lambda made: copy.deepcopy(model)) if own else None)  # type: ignore[arg-type, return-value]
