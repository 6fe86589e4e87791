"""Our activations and sums beside TransformerLens's own, by name, on random GPT-2- and Llama-shaped models.

TransformerLens with HookedTransformer (up to 3.x) is no dependency of the tests; where it is missing they are skipped:
pip install "transformer-lens<3" in an environment of its own beside this package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minigpt.internals.study import Study
from minigpt.model.gpt import GPT
from toys import random_ids, random_model, tiny_config

pytest.importorskip("transformer_lens", reason="transformer_lens is not installed")
lens = pytest.importorskip(
    "transformer_lens.HookedTransformer", reason="this transformer_lens has no HookedTransformer; install one before 4"
)

IDS = random_ids(2, 9)


def twin_of(model: GPT) -> Any:
    """A HookedTransformer with the same weights, nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = model.config
    gated = config.activation == "swiglu"
    theirs = HookedTransformer(
        HookedTransformerConfig(
            n_layers=config.n_layer,
            d_model=config.n_embd,
            n_ctx=config.block_size,
            d_head=config.head_dim,
            n_heads=config.n_head,
            n_key_value_heads=config.n_kv_head if config.n_kv_head != config.n_head else None,
            d_mlp=config.n_inner,
            d_vocab=config.vocab_size,
            act_fn="silu" if gated else "gelu_new",
            gated_mlp=gated,
            normalization_type="LN" if config.norm == "layernorm" else "RMS",
            eps=config.norm_eps,
            positional_embedding_type="standard" if config.position == "learned" else "rotary",
            rotary_dim=None if config.position == "learned" else config.head_dim,
            rotary_base=int(config.rope_theta),
            final_rms=config.norm == "rmsnorm",
            use_attn_result=True,
            use_hook_mlp_in=True,
            default_prepend_bos=False,
            device="cpu",
        )
    )
    state = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos")):
            state[name] = tensor
    state["embed.W_E"] = model.trunk.embed.weight
    if model.trunk.position is not None:
        state["pos_embed.W_pos"] = model.trunk.position.weight
    state["unembed.W_U"] = model.unembed.weight.T
    norms = {"ln_final": model.trunk.norm}
    for layer, block in enumerate(model.trunk.blocks):
        at, attn, mlp = f"blocks.{layer}.", block.attn, block.mlp
        norms |= {f"{at}ln1": block.norm1, f"{at}ln2": block.norm2}
        counts = (config.n_head, config.n_kv_head, config.n_kv_head)
        heads = attn.qkv.weight.unflatten(0, (-1, config.head_dim)).split(counts)  # (heads, D, C) each
        biases = None if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, (-1, config.head_dim)).split(counts)
        for place, letter in enumerate("QKV"):
            mark = "_" if letter != "Q" and config.n_kv_head != config.n_head else ""
            state[f"{at}attn.{mark}W_{letter}"] = heads[place].transpose(1, 2)
            if biases is not None:
                state[f"{at}attn.{mark}b_{letter}"] = biases[place]
        state[f"{at}attn.W_O"] = attn.proj.weight.T.unflatten(0, (config.n_head, config.head_dim))
        state[f"{at}mlp.W_in"], state[f"{at}mlp.W_out"] = mlp.up.weight.T, mlp.down.weight.T
        if mlp.gate is not None:
            state[f"{at}mlp.W_gate"] = mlp.gate.weight.T
        for name, bias in (("attn.b_O", attn.proj.bias), ("mlp.b_in", mlp.up.bias), ("mlp.b_out", mlp.down.bias)):
            if bias is not None:
                state[at + name] = bias
    for name, norm in norms.items():
        state[f"{name}.w"] = norm.weight
        if getattr(norm, "bias", None) is not None:
            state[f"{name}.b"] = norm.bias
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def pair(preset: str) -> tuple[Study, Any]:
    study = Study.of(random_model(tiny_config(preset)))
    return study, twin_of(study.model)


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
@torch.no_grad()
def test_every_activation_of_the_same_name_is_theirs(preset: str) -> None:
    study, theirs = pair(preset)
    logits, cache = study.run_with_cache(IDS, lambda name: not name.endswith("_input"))
    their_logits, their_cache = theirs.run_with_cache(IDS)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5 * float(their_logits.abs().max()))
    assert set(cache) <= set(their_cache.keys()), set(cache) - set(their_cache.keys())
    for name, value in cache.items():
        other = their_cache[name]
        if name.endswith("hook_normalized") and preset == "gpt2":
            # Of a LayerNorm theirs is after its weight and bias, of an RMSNorm before, as ours of both.
            norm = study.model.trunk.norm
            if not name.startswith("ln_final"):
                block = study.model.trunk.blocks[int(name.split(".")[1])]
                norm = block.norm1 if ".ln1." in name else block.norm2
            value = value * norm.weight + norm.bias
        assert value.shape == other.shape, name
        size = float(other[other.isfinite()].abs().max())
        torch.testing.assert_close(
            value, other, rtol=1e-5, atol=1e-5 * max(1.0, size), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
@torch.no_grad()
def test_the_stream_is_taken_apart_as_theirs_is(preset: str) -> None:
    study, theirs = pair(preset)
    _, cache = theirs.run_with_cache(IDS[:1])
    terms, labels = cache.decompose_resid(return_labels=True)
    ours = study.components(IDS[:1], "component")
    renamed = [label.replace("_attn_out", " attn").replace("_mlp_out", " mlp") for label in labels]
    own = [label if label.endswith("embed") else label.removeprefix("L") for label in ours.axes[0].labels]
    assert own == renamed
    np.testing.assert_allclose(ours.values, terms[:, 0].numpy(), rtol=1e-5, atol=1e-4)
    heads = cache.stack_head_results()[:, 0].numpy()
    by_head = study.components(IDS[:1], "head")
    rows = [place for place, label in enumerate(by_head.axes[0].labels) if "H" in label]
    np.testing.assert_allclose(by_head.values[rows], heads, rtol=1e-5, atol=1e-4)
