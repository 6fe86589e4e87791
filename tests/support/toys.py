"""Models at toy size in three presets, their twins in transformers, and versions of it that a test needs."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from packaging.specifiers import SpecifierSet

from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT

PRESETS = ("gpt2", "llama", "modern")


def tiny_config(preset: str, **changes: object) -> GPTConfig:
    """A few thousand parameters: 2 layers, 4 heads (2 key/value heads where the preset allows), 32 channels."""
    values: dict = {
        "preset": preset,
        "vocab_size": 61,
        "block_size": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 4 if preset == "gpt2" else 2,
        "n_embd": 32,
        "bigram_rows": 64 if preset == "modern" else 0,  # fewer than there are pairs: some share
        "trigram_rows": 64 if preset == "modern" else 0,
    }
    return GPTConfig(**{**values, **changes})


def random_model(config: GPTConfig, seed: int = 0, scale: float = 0.3) -> GPT:
    """A model whose every parameter, biases and norms included, is far from its starting value."""
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + scale * noise if "norm" in name and name.endswith("weight") else scale * noise)
    return model


def random_ids(rows: int, length: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def needs_transformers(versions: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test where the installed transformers is none of the versions, such as ">=5.24", that follow its rule."""
    installed = importlib.metadata.version("transformers")
    holds = SpecifierSet(versions).contains(installed, prereleases=True)
    return pytest.mark.skipif(not holds, reason=f"transformers {installed}, not {versions}: {reason}")


def transformers_twin(model: GPT) -> torch.nn.Module:
    """transformers' GPT2LMHeadModel or LlamaForCausalLM with the same weights."""
    import transformers

    from minigpt.checkpoint.saving import state_of
    from minigpt.checkpoint.weights import to_huggingface

    layout = to_huggingface(model.config, state_of(model))
    assert layout is not None
    values, tensors = layout
    kind = getattr(transformers, values["architectures"][0])
    twin = kind(kind.config_class(**{key: value for key, value in values.items() if key != "architectures"}))
    missing, unexpected = twin.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_embeddings else set())
    return twin.eval()
