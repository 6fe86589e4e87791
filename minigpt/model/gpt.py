"""The model: token ids -> hidden states -> logits.

Shapes are written in trailing comments with these letters, the same in every file:
    B batch rows    T new tokens per row    S slots held in the cache (keys that attention sees)
    C channels      H query heads         G key/value heads    D head width    V vocabulary    K beams
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.errors import ConfigError
from minigpt.model.attention import Attention
from minigpt.model.cache import KVCache, Step, causal_step
from minigpt.model.config import GPTConfig
from minigpt.model.layers import MLP, NgramEmbedding
from minigpt.model.norms import make_norm
from minigpt.model.positions import make_embedding
from minigpt.model.precision import widen


class Block(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.norm2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.drop(self.attn(self.norm1(x), step, cache))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


class Trunk(nn.Module):
    """Embeddings, blocks and final norm: token ids -> normed hidden states."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.block_size = config.block_size
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        ngrams = ((2, config.bigram_rows), (3, config.trigram_rows))
        tables = [NgramEmbedding(n, config.vocab_size, rows, config.n_embd) if rows else None for n, rows in ngrams]
        self.bigram, self.trigram = tables
        self.position = make_embedding(config)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)

    def begin(self, ids: Tensor, cache: KVCache | None) -> Step:
        """Positions and mask of this forward pass. Raises ConfigError for more than block_size tokens."""
        held = cache.longest if cache is not None else 0
        if held + ids.shape[1] > self.block_size:
            raise ConfigError(
                f"model.block_size: {held + ids.shape[1]} tokens do not fit in {self.block_size}; "
                f"give fewer tokens, or train with a larger block_size"
            )
        return causal_step(ids.shape[1], ids.device) if cache is None else cache.begin(ids.shape[1])

    def ngrams(self, ids: Tensor, step: Step, cache: KVCache | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and output (B, T, C) of each n-gram embedding."""
        tables = [(name, table) for name in ("bigram", "trigram") if (table := getattr(self, name)) is not None]
        if not tables:
            return
        n = tables[-1][1].n
        if cache is None:
            padded = F.pad(ids, (n - 1, 0), value=-1)
            history = padded.unfold(1, n, 1).flip(-1)  # (B, T, n)
        else:
            history = cache.history(ids, step, n)
        for name, table in tables:
            yield name, table(history)

    def start(self, ids: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:  # (B, T) -> (B, T, C)
        """Compute the input of the first block: the sum of all embeddings."""
        x = self.embed(ids)  # (B, T, C)
        for _, term in self.ngrams(ids, step, cache):
            x = x + term
        if self.position is not None:
            x = x + self.position.embed(step.positions)  # type: ignore[operator]  # (T, C) or (B, T, C)
        return self.drop(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T) -> (B, T, C)
        step = self.begin(ids, cache)
        x = self.start(ids, step, cache)  # (B, T, C)
        for block in self.blocks:
            x = block(x, step, cache)
        if cache is not None:
            cache.advance(step)
        return self.norm(x)


class Unembed(nn.Module):
    """Hidden states -> logits, with a soft cap if config.logit_softcap is set (Gemma 2, arXiv 2408.00118)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.softcap = config.logit_softcap
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))

    def project(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        """Logits before the soft cap."""
        return F.linear(hidden, self.weight)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        logits = self.project(hidden)
        if self.softcap:
            logits = self.softcap * torch.tanh(widen(logits) / self.softcap)
        return logits


class GPT(nn.Module):
    """A decoder-only Transformer: `trunk` (ids -> hidden states), then `unembed` (hidden states -> logits).

    `forward` is their composition. Call the two parts separately to get the hidden states, the logits of one position,
    or a loss in chunks. Decoding uses only the properties and methods at the end of the class.
    """

    def __init__(self, config: GPTConfig) -> None:
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size: not given; take it from the tokenizer (tokenizer.vocab_size)")
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.unembed = Unembed(config)
        if config.tie_embeddings:
            self.tie()
        kept = [n for m in self.modules() for n in m._buffers if n not in m._non_persistent_buffers_set]
        if kept:
            raise ConfigError(
                f"model: buffer {kept[0]} would not be saved; register it with persistent=False, or make it a parameter"
            )
        self.reset_parameters()

    def tie(self) -> None:
        """Share the embedding's weight with the unembedding."""
        self.unembed.weight = cast(nn.Parameter, self.trunk.embed.weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        return self.unembed(self.trunk(ids, cache))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize all parameters. GPT-2: normal(0, 0.02), output projections scaled by 1/sqrt(2 n_layer).

        With zero_init the output projections and an untied unembedding are zero, so that the initial loss is exactly
        ln V. The other matrices of the blocks are uniform with variance 1/fan-in, and the embeddings normal(0, 1)
        if they are untied.
        """
        parts = self._parts()
        inside = {id(parameter) for part in parts for parameter in part.parameters()}
        for name, module in self.named_modules():
            if module in parts and hasattr(module, "begin"):
                module.begin(generator)
            for short, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{short}"
                tied = parameter is self.trunk.embed.weight and name == "unembed"
                if id(parameter) not in inside and not tied:
                    self._begin(full, parameter, generator)

    def _parts(self) -> set[nn.Module]:
        """The modules that set their own start values; without a method `begin`, their constructors' values stay."""
        trunk = self.trunk
        found = [trunk.norm, trunk.position, trunk.bigram, trunk.trigram]
        for block in trunk.blocks:
            assert isinstance(block, Block)
            found += [block.norm1, block.norm2, block.attn.position, block.attn.q_norm, block.attn.k_norm]
        return {part for part in found if part is not None}

    def _begin(self, name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
        """The start values of the embedding, the unembedding and the linear layers."""
        config = self.config
        if parameter.dim() < 2:  # biases
            nn.init.zeros_(parameter)
        elif name.endswith(("attn.proj.weight", "mlp.down.weight")):
            if config.zero_init:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer), generator=generator)
        elif config.zero_init and name == "unembed.weight":
            nn.init.zeros_(parameter)
        elif config.zero_init and name.startswith("trunk.blocks"):
            bound = math.sqrt(3 / parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif config.zero_init and not config.tie_embeddings:
            nn.init.normal_(parameter, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)

    # The interface that decoding uses.

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the unembedding."""
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def max_context(self) -> int:
        """Maximum context length in tokens (block_size)."""
        return self.config.block_size

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.trunk.embed.weight.device

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Create an empty cache for `rows` sequences of up to `capacity` tokens, in the weights' dtype and device."""
        assert self.config.n_kv_head is not None and self.config.head_dim is not None
        return KVCache(
            self.config.n_layer,
            rows,
            self.config.n_kv_head,
            min(capacity, self.config.block_size),
            self.config.head_dim,
            dtype=self.trunk.embed.weight.dtype,
            device=self.device,
        )

    def next_logits(self, ids: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """Return the logits (B, V) after the last token of each row; append the tokens to the cache.

        Args:
            ids: new tokens (B, T), padded on the right.
            cache: cache with B rows.
            counts: (B) number of tokens per row without padding, at least 1; None: T for all rows.
        """
        if counts is None:
            return self.unembed(self.trunk(ids, cache)[:, -1])
        held = cache.lengths
        hidden = self.trunk(ids, cache)  # (B, T, C)
        cache.truncate(held + counts)
        return self.unembed(hidden[torch.arange(len(ids), device=ids.device), counts - 1])

    def all_logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, T, V) after every token of ids (B, T)."""
        return self(ids, cache)


class _Unfilled(TorchFunctionMode):
    """Skips torch.nn.init and the in-place fills that it calls, because meta tensors have no values."""

    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FILLS or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def outline(config: GPTConfig) -> GPT:
    """Create a GPT on the meta device: names and shapes without memory or values.

    Before use, assign its tensors and make its buffers (see checkpoint/filling.py).
    """
    with torch.device("meta"), _Unfilled():
        return GPT(config)
