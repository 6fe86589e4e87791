"""The model against transformers, against itself, and against what a language model must be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from minigpt.errors import ConfigError
from minigpt.model.config import GPTConfig
from minigpt.model.cost import cost_of
from minigpt.model.explicit import explicit_forward
from minigpt.model.gpt import GPT
from minigpt.model.layers import NgramEmbedding
from toys import PRESETS, random_ids, random_model, tiny_config, transformers_twin

GPT2_SHAPES = [
    {},
    {"n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 48, "block_size": 40, "vocab_size": 97},
    {"tie_embeddings": False},
    {"n_inner": 80, "activation": "gelu_exact"},
]
LLAMA_SHAPES = [
    {},
    {"n_layer": 3, "n_head": 6, "n_kv_head": 2, "n_embd": 48, "n_inner": 100},
    {"n_kv_head": 1, "tie_embeddings": True},
    {"n_kv_head": 4, "head_dim": 16, "rope_theta": 500.0},
    {"bias": True},
]


@pytest.mark.parametrize("changes", GPT2_SHAPES)
def test_logits_equal_transformers_gpt2(changes: dict) -> None:
    config = tiny_config("gpt2", **changes)
    model = random_model(config)
    theirs = transformers_twin(model)
    ids = random_ids(3, config.block_size, config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", LLAMA_SHAPES)
def test_logits_equal_transformers_llama(changes: dict) -> None:
    config = tiny_config("llama", **changes)
    model = random_model(config)
    theirs = transformers_twin(model)
    ids = random_ids(3, config.block_size, config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_and_explicit_forward_agree(preset: str) -> None:
    model = random_model(tiny_config(preset))
    ids = random_ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), explicit_forward(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_and_explicit_gradients_agree(preset: str) -> None:
    model = random_model(tiny_config(preset)).double()
    ids = random_ids(2, 12)
    gradients = []
    for forward in (model, lambda ids: explicit_forward(model, ids)):
        model.zero_grad()
        F.cross_entropy(forward(ids).flatten(0, 1), ids.flatten()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_forward_names_every_term_of_the_stream(preset: str) -> None:
    model = random_model(tiny_config(preset))
    seen: dict[str, torch.Tensor] = {}

    def tap(name: str, activation: torch.Tensor) -> torch.Tensor:
        assert name not in seen
        seen[name] = activation
        return activation

    ids = random_ids(2, 9)
    with torch.no_grad():
        explicit_forward(model, ids, tap=tap)
    terms = [seen["hook_embed"]]
    terms += [seen[f"hook_{also}_embed"] for also in ("pos", "bigram", "trigram") if f"hook_{also}_embed" in seen]
    terms += [seen[f"blocks.{layer}.hook_{part}_out"] for layer in range(2) for part in ("attn", "mlp")]
    torch.testing.assert_close(sum(terms), seen["blocks.1.hook_resid_post"])
    pattern = seen["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (2, 4, 9, 9)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 9))
    assert (pattern.triu(1) == 0).all()
    assert seen["blocks.0.attn.hook_z"].shape == (2, 9, 4, 8)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tap_changes_what_follows(preset: str) -> None:
    model = random_model(tiny_config(preset))
    ids = random_ids(1, 6)

    def without_layer_1(name: str, activation: torch.Tensor) -> torch.Tensor:
        return activation * 0 if name.startswith("blocks.1.hook") and name.endswith("_out") else activation

    shallow = GPT(tiny_config(preset, n_layer=1)).eval()
    shallow.load_state_dict({k: v for k, v in model.state_dict().items() if ".blocks.1." not in k})
    with torch.no_grad():
        torch.testing.assert_close(
            explicit_forward(model, ids, tap=without_layer_1), shallow(ids), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_no_position_sees_the_future(preset: str) -> None:
    model = random_model(tiny_config(preset))
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % 61
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_model_predicts_every_token_alike(preset: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(preset, vocab_size=1000, n_embd=64))
    ids = random_ids(8, 24, 1000)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(1000)) < 0.05


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_overfits_one_batch(preset: str) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_config(preset))
    ids = random_ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("preset", PRESETS)
def test_the_counted_parameters_are_those_of_the_model(preset: str) -> None:
    for changes in ({}, {"n_kv_head": 1} if preset != "gpt2" else {"bias": False}, {"tie_embeddings": True}):
        config = tiny_config(preset, **changes)
        assert cost_of(config).parameters == sum(p.numel() for p in GPT(config).parameters())


def test_the_counted_flops_are_those_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config("llama", n_kv_head=4)
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        explicit_forward(model, random_ids(1, config.block_size))
    # The explicit attention computes the whole square of scores, of which a causal one needs (T + 1) / 2T.
    square = 4 * config.n_layer * config.n_head * config.head_dim * config.block_size
    causal = square * (config.block_size + 1) / (2 * config.block_size)
    counted = counter.get_total_flops() / config.block_size
    assert cost_of(config).forward_flops == pytest.approx(counted - square + causal)


def test_dropout_acts_only_while_training() -> None:
    model = random_model(tiny_config("gpt2", dropout=0.5))
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


def test_a_softcap_bounds_the_logits() -> None:
    model = random_model(tiny_config("modern", logit_softcap=3.0), scale=2.0)
    with torch.no_grad():
        assert model(random_ids(2, 8)).abs().max() <= 3.0


def test_more_tokens_than_the_block_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"25 tokens do not fit in 24"):
        random_model(tiny_config("gpt2"))(random_ids(1, 25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5, "n_kv_head": 5}, r"model\.n_head: 5 does not divide n_embd \(32\)"),
        ({"n_kv_head": 3}, r"model\.n_kv_head: 3 does not divide n_head \(4\)"),
        ({"n_layer": 0}, r"model\.n_layer: 0 is not a whole number"),
        ({"dropout": 1.0}, r"model\.dropout: 1\.0 is not in \[0, 1\)"),
        ({"preset": "gpt3"}, r"model\.preset: 'gpt3' is not one of"),
        ({"norm": "batchnorm"}, r"model\.norm: 'batchnorm' is not one of layernorm, rmsnorm"),
        ({"head_dim": 7, "preset": "llama"}, r"model\.head_dim: 7 is odd"),
        ({"logit_softcap": -1.0}, r"model\.logit_softcap: -1\.0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**{"preset": "gpt2", **changes})


def test_a_config_survives_its_dictionary() -> None:
    config = GPTConfig(preset="llama", vocab_size=300, n_head=8, n_kv_head=2, n_embd=64)
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown fields"):
        GPTConfig.from_dict({**config.to_dict(), "n_experts": 8})


def test_groups_of_tokens_have_a_row_each_or_share_rows_by_hash() -> None:
    history = torch.tensor([[[2, -1, -1], [0, 2, -1], [1, 0, 2], [2, 1, 0]]])
    pairs, triples = NgramEmbedding(2, 3, 100, 2), NgramEmbedding(3, 3, 100, 2)
    assert (len(pairs.weight), len(triples.weight)) == (12, 48)  # each of three tokens after none, 0, 1 or 2
    with torch.no_grad():
        for table in (pairs, triples):
            table.weight.copy_(torch.arange(float(len(table.weight)))[:, None])
    assert pairs(history)[0, :, 0].tolist() == [8, 3, 5, 10]  # 4 token + before + 1
    assert triples(history)[0, :, 0].tolist() == [32, 12, 23, 41]  # 4 of that + before that + 1
    hashed = NgramEmbedding(3, 50_000, 4096, 1)
    groups = torch.randint(50_000, (1, 100_000, 3), generator=torch.Generator().manual_seed(0))
    groups[0, :50_000, 1:] = 7  # half of them differ in one token only
    with torch.no_grad():
        hashed.weight.copy_(torch.arange(4096.0)[:, None])
    counts = torch.bincount(hashed(groups.unique(dim=1)).flatten().long(), minlength=4096)
    expected = counts.sum() / 4096
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 4095 + 5 * (2 * 4095) ** 0.5  # as evenly spread as chance would, or more


def test_attention_weights_can_have_a_dropout_of_their_own() -> None:
    assert tiny_config("modern", dropout=0.2).attn_dropout == 0.2
    model = random_model(tiny_config("modern", dropout=0.2, attn_dropout=0.0)).train()
    assert model.trunk.blocks[0].attn.dropout == 0.0
    assert model.trunk.blocks[0].drop.p == 0.2
