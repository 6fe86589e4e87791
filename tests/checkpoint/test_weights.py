"""Hugging Face's layouts, both ways: nothing invented, nothing lost, nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.checkpoint.saving import save_checkpoint, state_of
from minigpt.checkpoint.weights import config_from_huggingface, from_huggingface, to_huggingface
from minigpt.errors import CheckpointError
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig
from toys import random_ids, random_model, tiny_config, transformers_twin

EXPRESSIBLE = [
    tiny_config("gpt2"),
    tiny_config("gpt2", tie_embeddings=False, activation="gelu_exact"),
    tiny_config("llama"),
    tiny_config("llama", bias=True, tie_embeddings=True, n_kv_head=1),
]
OWN = [tiny_config("modern"), tiny_config("gpt2", bias=False), tiny_config("llama", qk_norm=True)]


@pytest.mark.parametrize("config", EXPRESSIBLE)
def test_a_round_trip_through_their_layout_is_bit_equal(config: minigpt.GPTConfig) -> None:
    state = state_of(random_model(config))
    layout = to_huggingface(config, state)
    assert layout is not None
    values, tensors = json.loads(json.dumps(layout[0])), layout[1]
    back = config_from_huggingface(values)
    assert {**back.to_dict(), "preset": "", "zero_init": 0} == {**config.to_dict(), "preset": "", "zero_init": 0}
    again = from_huggingface(values, back, tensors)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("config", OWN)
def test_a_model_their_layouts_cannot_hold_keeps_ours(config: minigpt.GPTConfig) -> None:
    assert to_huggingface(config, state_of(random_model(config))) is None


@pytest.mark.parametrize("config", EXPRESSIBLE)
def test_transformers_reads_a_checkpoint_folder(config: minigpt.GPTConfig, tmp_path: Path) -> None:
    import transformers

    model = random_model(config)
    save_checkpoint(tmp_path / "step-00000001", model, build_tokenizer(TokenizerConfig(kind="byte")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "step-00000001").eval()
    ids = random_ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", EXPRESSIBLE)
def test_a_folder_that_transformers_wrote_is_read(config: minigpt.GPTConfig, tmp_path: Path) -> None:
    model = random_model(config)
    transformers_twin(model).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    run = minigpt.load(tmp_path)
    ids = random_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(run.model(ids), model(ids))
    assert run.config == {}
    assert not run.model.training


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer.json of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefgh?")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_published_gpt2_file_is_read(tmp_path: Path) -> None:
    """Its names lack the prefix, and it carries mask buffers."""
    model = random_model(tiny_config("gpt2"))
    layout = to_huggingface(model.config, state_of(model))
    assert layout is not None
    values, tensors = layout
    published = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    published["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    published["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state = from_huggingface(values, model.config, published)
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(model).items())


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    transformers_twin(model).save_pretrained(tmp_path, max_shard_size="8KB")
    write_tokenizer(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(minigpt.load(tmp_path).model(ids), model(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; minigpt reads gpt2 and llama"),
        ({"activation_function": "relu"}, "activation_function is 'relu', which minigpt has no counterpart for"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_layer": "2"}, "n_layer is '2'; a whole number was expected"),
    ],
)
def test_a_config_without_counterpart_is_refused_by_name(change: dict, message: str) -> None:
    layout = to_huggingface(tiny_config("gpt2"), state_of(random_model(tiny_config("gpt2"))))
    assert layout is not None
    with pytest.raises(CheckpointError, match=message):
        config_from_huggingface({**layout[0], **change})


def test_scaled_rope_is_refused() -> None:
    layout = to_huggingface(tiny_config("llama"), state_of(random_model(tiny_config("llama"))))
    assert layout is not None
    scaled = {**layout[0], "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}
    with pytest.raises(CheckpointError, match="rope_type is 'llama3'"):
        config_from_huggingface(scaled)
    older = {key: value for key, value in layout[0].items() if key != "rope_parameters"}
    with pytest.raises(CheckpointError, match="rope_type is 'linear'"):
        config_from_huggingface({**older, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config_from_huggingface({**older, "rope_theta": 77.0}).rope_theta == 77.0


def test_missing_and_left_over_tensors_are_named() -> None:
    config = tiny_config("gpt2")
    layout = to_huggingface(config, state_of(random_model(config)))
    assert layout is not None
    values, tensors = layout
    less = {name: tensor for name, tensor in tensors.items() if name != "transformer.ln_f.bias"}
    with pytest.raises(CheckpointError, match=r"lack the tensor 'transformer\.ln_f\.bias'"):
        from_huggingface(values, config, less)
    with pytest.raises(CheckpointError, match=r"no place for: \['transformer\.h\.9\.ln_1\.bias'\]"):
        from_huggingface(values, config, {**tensors, "transformer.h.9.ln_1.bias": torch.zeros(32)})
