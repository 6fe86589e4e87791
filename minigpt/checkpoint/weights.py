"""Name maps between our parameters and Hugging Face's GPT-2 and Llama layouts, in both directions.

Our state holds one tensor a name and a tied unembedding once, as trunk.embed.weight. A layout is used for writing only
where it needs no tensor that the model does not have; `to_huggingface` says None otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.foreign import config_from_huggingface as config_from_huggingface
from minigpt.errors import CheckpointError
from minigpt.model.config import GPTConfig
from minigpt.terminal import notice_once

State = dict[str, Tensor]

GPT2_NAMES = {
    "trunk.embed": "transformer.wte",
    "trunk.position": "transformer.wpe",
    "trunk.norm": "transformer.ln_f",
    "unembed": "lm_head",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
LLAMA_NAMES = {
    "trunk.embed": "model.embed_tokens",
    "trunk.norm": "model.norm",
    "unembed": "lm_head",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
}
# The parts of a model that each layout describes.
GPT2_PARTS = {"norm": "layernorm", "position": "learned", "bias": True}
LLAMA_PARTS = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "norm_weight": True}
GPT2_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu"}
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # GPT-2 stores [in, out]


def fits_gpt2(config: GPTConfig) -> bool:
    """Whether Hugging Face's GPT-2 layout can hold this model without an invented tensor."""
    return (
        all(getattr(config, field) == value for field, value in GPT2_PARTS.items())
        and config.activation in GPT2_ACTIVATIONS
        and not config.qk_norm
        and not config.logit_softcap
        and not (config.bigram_rows or config.trigram_rows)
        and config.n_kv_head == config.n_head
        and config.n_head * (config.head_dim or 0) == config.n_embd
    )


def fits_llama(config: GPTConfig) -> bool:
    """Whether Hugging Face's Llama layout can hold this model without an invented tensor."""
    return (
        all(getattr(config, field) == value for field, value in LLAMA_PARTS.items())
        and not config.qk_norm
        and not config.logit_softcap
        and not (config.bigram_rows or config.trigram_rows)
    )


def _rename(name: str, names: Mapping[str, str], layers: str) -> str:
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"trunk\.blocks\.(\d+)\.(.+)", stem)
    if block:
        return f"{layers}.{block[1]}.{names[block[2]]}.{kind}"
    return f"{names[stem]}.{kind}"


def _gpt2_out(config: GPTConfig, state: State) -> State:
    out = {}
    for name, tensor in state.items():
        new = _rename(name, GPT2_NAMES, "transformer.h")
        out[new] = tensor.T.contiguous() if new.endswith(tuple(f"{t}.weight" for t in TRANSPOSED)) else tensor
    return out


def _llama_out(config: GPTConfig, state: State) -> State:
    assert config.n_kv_head is not None and config.head_dim is not None
    sizes = [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
    out = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            layer, kind = name.split(".")[2], name.rpartition(".")[2]
            for part, rows in zip("qkv", tensor.split(sizes), strict=True):
                out[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
        else:
            out[_rename(name, LLAMA_NAMES, "model.layers")] = tensor
    return out


def to_huggingface(config: GPTConfig, state: State) -> tuple[dict[str, Any], State] | None:
    """(config.json, tensors) in Hugging Face's layout; None where neither layout can hold the model as it is."""
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings, "dtype": "float32"}
    if fits_gpt2(config):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_inner,
            "activation_function": GPT2_ACTIVATIONS[str(config.activation)],
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.attn_dropout,
            **common,
        }, _gpt2_out(config, state)
    if fits_llama(config):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": config.n_embd,
            "intermediate_size": config.n_inner,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,  # read by transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # by transformers 5
            "attention_bias": config.bias,
            "attention_dropout": config.attn_dropout,
            "mlp_bias": config.bias,
            **common,
        }, _llama_out(config, state)
    return None


def _stack(tensors: State, names: list[str]) -> Tensor:
    return torch.cat([tensors.pop(name) for name in names])


def _prefixed(kind: str, tensors: Mapping[str, Tensor]) -> State:
    """The tensors under the names of the whole model: files of its base alone lack the prefix."""
    prefix = "transformer." if kind == "gpt2" else "model."
    if any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {name if name == "lm_head.weight" else f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _embeddings(kind: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    names = GPT2_NAMES if kind == "gpt2" else LLAMA_NAMES
    return tensors.get(f"{names['trunk.embed']}.weight"), tensors.get("lm_head.weight")


def untied_where_they_differ(
    values: Mapping[str, Any], config: GPTConfig, tensors: Mapping[str, Tensor], where: str = "config.json"
) -> GPTConfig:
    """The config, untied where it says tied and the file holds an unembedding that is not the embedding.

    As transformers does: both tensors are used, and a notice says so.
    """
    kind = values["model_type"]
    embed, head = _embeddings(kind, _prefixed(kind, tensors))
    if not config.tie_embeddings or embed is None or head is None:
        return config
    if embed.shape == head.shape and bool((embed == head).all()):
        return config
    notice_once(
        f"{where}: tie_word_embeddings is true, but the weights hold an lm_head that is not the embedding; both are "
        "used. Set it to false"
    )
    return replace(config, tie_embeddings=False)


def from_huggingface(
    values: Mapping[str, Any], config: GPTConfig, tensors: Mapping[str, Tensor], where: str = "config.json"
) -> State:
    """Our state of a Hugging Face GPT-2's or Llama's tensors: the inverse of to_huggingface.

    Files without the "transformer." or "model." prefix, and mask buffers, are read too. Raises CheckpointError for
    tensors that are missing, left over, or tied and different (see untied_where_they_differ).
    """
    kind = values["model_type"]
    names, layers = (GPT2_NAMES, "transformer.h") if kind == "gpt2" else (LLAMA_NAMES, "model.layers")
    tensors = _prefixed(kind, tensors)
    if kind == "gpt2":
        tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    if config.tie_embeddings:
        if untied_where_they_differ(values, config, tensors, where) is not config:
            raise CheckpointError(f"{where}: its weights hold an lm_head that is not the embedding they are tied to")
        head = tensors.pop("lm_head.weight", None)
        if head is not None:  # the one of the two that the file holds serves as both
            tensors.setdefault(f"{names['trunk.embed']}.weight", head)
    state = {}
    try:
        for name in parameter_shapes(config):
            if kind == "llama" and ".attn.qkv." in name:
                layer, suffix = name.split(".")[2], name.rpartition(".")[2]
                parts = [f"model.layers.{layer}.self_attn.{part}_proj.{suffix}" for part in "qkv"]
                state[name] = _stack(tensors, parts)
            else:
                theirs = _rename(name, names, layers)
                tensor = tensors.pop(theirs)
                turned = kind == "gpt2" and theirs.endswith(tuple(f"{t}.weight" for t in TRANSPOSED))
                state[name] = tensor.T.contiguous() if turned else tensor
    except KeyError as missing:
        raise CheckpointError(f"{where}: its weights lack the tensor {missing}") from None
    left = [name for name in tensors if "rotary_emb.inv_freq" not in name]
    if left:
        raise CheckpointError(f"{where}: its weights hold tensors that a {kind} has no place for: {sorted(left)[:4]}")
    return state


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of our state, without allocating any."""
    from minigpt.model.gpt import outline

    return {name: parameter.shape for name, parameter in outline(config).named_parameters()}
