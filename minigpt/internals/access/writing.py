"""Hooks during generation: a model for the sampler whose forward passes are watched.

A sampler asks little of a model (see decodable.py), so a study's edits reach whatever is written with it:

    with study.hooks({"resid_post": add(vector)}):
        Sampler(Written(study), study.tokenizer).generate("ROMEO:")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.activations import Activations
from minigpt.model.cache import KVCache

if TYPE_CHECKING:
    from minigpt.internals.access.access import Access


class Written:
    """A study as a sampler's model: the edits that are open when a token is read count for it.

    Args:
        study: whose model writes.
        keep: full names of activations to keep, of every forward.
    """

    def __init__(self, study: Access, keep: list[str] | None = None) -> None:
        self.study, self.keep = study, keep or []
        self.model = study.model
        self.vocab_size, self.max_context, self.device = (
            self.model.vocab_size,
            self.model.max_context,
            self.model.device,
        )
        self.seen: list[dict[str, Tensor]] = []  # of each forward, in order

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """See `minigpt.GPT.new_cache`."""
        return self.model.new_cache(rows, capacity)

    def hidden(self, ids: Tensor, cache: KVCache | None) -> Tensor:  # (B, T) -> (B, T, C)
        """One watched forward."""
        watch = self.study.watch(self.keep)
        with self.study.running():
            hidden = self.study.forward(ids, cache, watch)
        if self.keep:
            self.seen.append(watch.kept)
        return hidden

    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """Logits (B, V) after each row's last token; see `minigpt.GPT.next_logits`."""
        held = cache.lengths
        hidden = self.hidden(ids, cache)
        if counts is None:
            return self.model.unembed(hidden[:, -1])
        cache.truncate(held + counts)
        return self.model.unembed(hidden[torch.arange(len(ids), device=ids.device), counts - 1])

    def all_logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) after every token of ids (B, T)."""
        return self.model.unembed(self.hidden(ids, cache))


def write(study: Access, prompt: str, keep: list[str], settings: dict[str, Any]) -> tuple[Any, Activations]:
    """One completion of one prompt and the activations on the way; see `Study.generate`.

    Raises ConfigError for settings that write several texts, and for a text that outgrows the model's context while
    activations are kept, as those before the window are then no longer one forward's.
    """
    from minigpt.sampling.sampler import Sampler

    if not isinstance(prompt, str):
        raise ConfigError("generate: one prompt at a time, as text")
    for name in ("num_beams", "num_return_sequences"):
        if settings.get(name, 1) != 1:
            raise ConfigError(f"generate: {name} is {settings[name]}, but one text at a time is watched; leave it out")
    model = Written(study, keep)
    sampler = Sampler(model, study.tokenizer)
    [[completion]] = sampler.generate(prompt, **settings)
    if not keep:
        return completion, Activations(study.config, {})
    if not model.seen:
        raise ConfigError("generate: no token was written, so nothing was read to keep; expected max_new_tokens from 1")
    read = len(completion.prompt_ids) + len(completion.ids) - 1
    if read > study.config.block_size:
        raise ConfigError(
            f"generate: {read + 1} tokens outgrow the context of {study.config.block_size}, so that activations of "
            "one forward do not exist; write fewer tokens, or keep none"
        )
    return completion, Activations(study.config, {name: _joined(study, name, model.seen, read) for name in keep})


def _joined(study: Access, name: str, seen: list[dict[str, Tensor]], length: int) -> Tensor:
    """An activation of successive forwards as that of one: joined along its positions, slots filled up."""
    axes = study.table[name].axes
    parts = [forward[name] for forward in seen]
    if "slot" in axes:
        empty = -torch.inf if name.endswith("scores") else 0.0
        parts = [torch.nn.functional.pad(part, (0, length - part.shape[-1]), value=empty) for part in parts]
    return torch.cat(parts, axes.index("pos"))
