"""Name maps between our parameters and Hugging Face's GPT-2 and Llama layouts, both ways.

Our state holds one tensor a name and a tied unembedding once, as trunk.embed.weight. A layout is used for writing only
where it needs no tensor that the model does not have; `to_huggingface` says None otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import CheckpointError
from minigpt.model.config import GPTConfig

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
GPT2_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu"}
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # GPT-2 stores [in, out]


def fits_gpt2(config: GPTConfig) -> bool:
    """Whether Hugging Face's GPT-2 layout can hold this model without an invented tensor."""
    return (
        (config.norm, config.position, config.bias) == ("layernorm", "learned", True)
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
        (config.norm, config.position, config.activation) == ("rmsnorm", "rope", "swiglu")
        and bool(config.norm_weight)
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
            "mlp_bias": config.bias,
            **common,
        }, _llama_out(config, state)
    return None


def _expect(values: Mapping[str, Any], field: str, allowed: tuple[Any, ...], where: str) -> None:
    if values.get(field, allowed[0]) not in allowed:
        raise CheckpointError(
            f"{where}: {field} is {values[field]!r}, which minigpt has no counterpart for; expected {allowed[0]!r}"
        )


def _whole(values: Mapping[str, Any], field: str, where: str) -> int:
    value = values.get(field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {field} is {value!r}; a whole number was expected")
    return value


def _gpt2_config(values: Mapping[str, Any], where: str) -> GPTConfig:
    _expect(values, "scale_attn_weights", (True,), where)
    _expect(values, "scale_attn_by_inverse_layer_idx", (False,), where)
    _expect(values, "add_cross_attention", (False,), where)
    activations = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
    _expect(values, "activation_function", tuple(activations), where)
    return GPTConfig(
        preset="gpt2",
        vocab_size=_whole(values, "vocab_size", where),
        block_size=_whole(values, "n_positions", where),
        n_layer=_whole(values, "n_layer", where),
        n_head=_whole(values, "n_head", where),
        n_embd=_whole(values, "n_embd", where),
        n_inner=values.get("n_inner"),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=activations[values.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def _llama_config(values: Mapping[str, Any], where: str) -> GPTConfig:
    _expect(values, "hidden_act", ("silu",), where)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}  # "type" is what older files say
    _expect(rope, "rope_type", ("default",), f"{where}, rope_parameters")
    _expect(rope, "partial_rotary_factor", (1.0,), f"{where}, rope_parameters")
    bias = values.get("attention_bias", False)
    _expect(values, "mlp_bias", (bias, *((None,) if not bias else ())), where)
    return GPTConfig(
        preset="llama",
        vocab_size=_whole(values, "vocab_size", where),
        block_size=_whole(values, "max_position_embeddings", where),
        n_layer=_whole(values, "num_hidden_layers", where),
        n_head=_whole(values, "num_attention_heads", where),
        n_kv_head=values.get("num_key_value_heads"),
        n_embd=_whole(values, "hidden_size", where),
        n_inner=_whole(values, "intermediate_size", where),
        head_dim=values.get("head_dim"),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
        bias=bias,
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


CONFIG_READERS: dict[str, Callable[[Mapping[str, Any], str], GPTConfig]] = {
    "gpt2": _gpt2_config,
    "llama": _llama_config,
}


def _stack(tensors: State, names: list[str]) -> Tensor:
    return torch.cat([tensors.pop(name) for name in names])


def config_from_huggingface(values: Mapping[str, Any], where: str = "config.json") -> GPTConfig:
    """Our config of a Hugging Face GPT-2's or Llama's config.json.

    Raises CheckpointError for another architecture and for a setting we have no counterpart for.
    """
    kind = values.get("model_type")
    if kind not in CONFIG_READERS:
        raise CheckpointError(f"{where}: model_type is {kind!r}; minigpt reads {' and '.join(CONFIG_READERS)}")
    return CONFIG_READERS[kind](values, where)


def from_huggingface(
    values: Mapping[str, Any], config: GPTConfig, tensors: Mapping[str, Tensor], where: str = "config.json"
) -> State:
    """Our state of a Hugging Face GPT-2's or Llama's tensors: the inverse of to_huggingface.

    GPT-2 files without the "transformer." prefix, and their mask buffers, are read too. Raises CheckpointError for
    tensors that are missing or left over.
    """
    kind = values["model_type"]
    names, layers = (GPT2_NAMES, "transformer.h") if kind == "gpt2" else (LLAMA_NAMES, "model.layers")
    tensors = dict(tensors)
    if kind == "gpt2":
        if not any(name.startswith("transformer.") for name in tensors):
            tensors = {name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in tensors.items()}
        tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
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
    from minigpt.model.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
