"""Seeing and changing activations: names, shapes, edits, generation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.names import activations, select
from minigpt.internals.study import Study
from minigpt.model.explicit import explicit_forward
from minigpt.tokenizer.plain import CharTokenizer
from toys import PRESETS, random_ids, random_model, tiny_config

LETTERS = {"batch": 2, "pos": 9, "slot": 9, "head": 4, "d_head": 8, "d_model": 32, "one": 1}


def study_of(preset: str, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes)))


def written(preset: str) -> Study:
    """One that reads and writes text: 61 characters."""
    tokenizer = CharTokenizer([chr(48 + i) for i in range(61)])
    return Study.of(random_model(tiny_config(preset)), tokenizer)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_of_names_is_what_a_run_computes(preset: str) -> None:
    study = study_of(preset)
    _, cache = study.run_with_cache(random_ids(2, 9), lambda name: True)
    inputs = {f"blocks.{layer}.ln1.hook_{part}" for layer in range(2) for part in ("scale", "normalized")}
    # Where each head reads the stream by itself, there is no one norm before attention.
    assert set(cache) == set(study.table) - inputs
    _, usual = study.run_with_cache(random_ids(2, 9))
    assert list(usual) == select(study.config, None) == [n for n, a in study.table.items() if not a.on_request]
    sizes = {**LETTERS, "kv_head": study.config.n_kv_head, "d_mlp": study.config.n_inner}
    for name, value in [*cache.items(), *usual.items()]:
        assert tuple(value.shape) == tuple(sizes[axis] for axis in study.table[name].axes), name


@pytest.mark.parametrize("preset", PRESETS)
def test_watching_changes_no_bit_of_the_explicit_forward(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 9)
    with torch.no_grad():
        expected = explicit_forward(study.model, ids)
    for names in (None, "pattern", "blocks.1.hook_resid_*", ()):
        logits, _ = study.run_with_cache(ids, names)
        assert torch.equal(logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(study.logits(ids), study.model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_heads_read_and_write_by_themselves_is_the_same_computation(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 9)
    logits, cache = study.run_with_cache(ids, ["result", "q_input", "k_input", "v_input", "attn_out", "resid_pre"])
    torch.testing.assert_close(logits, study.logits(ids), rtol=1e-4, atol=1e-5)
    bias = study.model.trunk.blocks[1].attn.proj.bias
    total = cache["result", 1].sum(2) + (0 if bias is None else bias)
    torch.testing.assert_close(total, cache["attn_out", 1], rtol=1e-5, atol=1e-5)
    assert (cache["q_input", 1] == cache["resid_pre", 1][:, :, None]).all()


def test_names_may_be_short_patterned_or_functions() -> None:
    study = study_of("llama")
    _, cache = study.run_with_cache(random_ids(2, 9), ["pattern", ("resid_post", -1), "embed"])
    assert list(cache) == [
        "hook_embed",
        "blocks.0.attn.hook_pattern",
        "blocks.1.attn.hook_pattern",
        "blocks.1.hook_resid_post",
    ]
    assert cache["pattern", 1] is cache["blocks.1.attn.hook_pattern"]
    assert cache["resid_post", -1] is cache["blocks.1.hook_resid_post"]
    assert cache["embed"] is cache["hook_embed"]
    assert cache.stack("pattern").shape == (2, 2, 4, 9, 9)
    assert ("pattern", 0) in cache and "hook_q" not in cache
    assert select(study.config, "blocks.*.mlp.hook_p*") == [
        f"blocks.{layer}.mlp.hook_{part}" for layer in range(2) for part in ("pre", "pre_linear", "post")
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("patern", "did you mean pattern"),
        ("blocks.0.attn.hook_zz", "did you mean blocks.0.attn.hook_z"),
        ("blocks.*.nothing", "matches none"),
        (("pattern", 2), "layers are 0 .. 1"),
        ("scale", "ambiguous, matches ln1.hook_scale, ln2.hook_scale, ln_final.hook_scale"),
        ("pos_embed", "this model has no such activation"),
        (lambda name: "nothing" in name, "the function selects none"),
        (
            "blocks.*.attn.hook_result",
            "patterns do not match costly activations; give the name: blocks.0.attn.hook_result",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(names: object, message: str) -> None:
    study = study_of("llama")
    with pytest.raises(ConfigError, match=message):
        study.run_with_cache(random_ids(1, 4), names)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message), study.hooks({names: 0.0}):
        pass


def test_what_was_not_kept_is_not_there() -> None:
    _, cache = study_of("gpt2").run_with_cache(random_ids(1, 4), "pattern")
    with pytest.raises(ConfigError, match="was not kept"):
        cache["z", 0]
    with pytest.raises(ConfigError, match="give the layer"):
        cache["pattern"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_can_stop_early_and_keep_some_positions(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 9)
    _, whole = study.run_with_cache(ids)
    logits, cache = study.run_with_cache(ids, [("resid_mid", 0), ("pattern", 0)], positions=[-1, 2], stop=True)
    assert logits.shape == (2, 0, 61)
    assert torch.equal(cache["resid_mid", 0], whole["resid_mid", 0][:, [8, 2]])
    assert torch.equal(cache["pattern", 0], whole["pattern", 0][:, :, [8, 2]])
    seen: list[str] = []
    with study.hooks({"resid_pre": lambda x, site: seen.append(site.name)}):
        study.run_with_cache(ids, ("resid_mid", 0), stop=True)
    assert seen == ["blocks.0.hook_resid_pre"]


@pytest.mark.parametrize("preset", PRESETS)
def test_removing_a_head_is_removing_what_it_writes(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 9)

    def silent(z: torch.Tensor, site: object) -> None:
        z[:, :, 1] = 0

    def without(out: torch.Tensor, site: object) -> torch.Tensor:
        return out - written["result", 0][:, :, 1]

    _, written = study.run_with_cache(ids, "result")
    with study.hooks({("z", 0): silent}):
        by_z = study.logits(ids)
    with study.hooks({("attn_out", 0): without}):
        by_out = study.logits(ids)
    torch.testing.assert_close(by_z, by_out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_z, study.logits(ids), atol=1e-3)


def test_changing_the_stream_changes_what_follows_and_a_copy_of_it_does_not() -> None:
    study, ids = study_of("modern"), random_ids(1, 9)
    _, plain = study.run_with_cache(ids)
    with study.hooks({("resid_mid", 0): 0.0}):
        _, cache = study.run_with_cache(ids)
    assert torch.equal(cache["attn_out", 0], plain["attn_out", 0])
    assert torch.equal(cache["resid_post", 0], cache["mlp_out", 0])  # the stream was emptied before the MLP
    with study.hooks({("mlp_in", 0): 0.0}):
        _, cache = study.run_with_cache(ids)
    assert torch.equal(cache["resid_mid", 0], plain["resid_mid", 0])
    assert torch.equal(cache["resid_post", 0], plain["resid_mid", 0] + cache["mlp_out", 0])
    assert not torch.equal(cache["mlp_out", 0], plain["mlp_out", 0])


def test_edits_nest_and_end_with_their_block_even_after_an_error() -> None:
    study, ids = study_of("llama"), random_ids(1, 5)
    plain = study.logits(ids)
    order: list[str] = []
    with study.hooks({("z", 0): lambda z, site: order.append("outer")}):
        with (
            pytest.raises(RuntimeError, match="on purpose"),
            study.hooks({("z", 0): lambda z, site: order.append("inner"), ("z", 1): 0.0}),
        ):
            study.logits(ids)
            raise RuntimeError("on purpose")
        assert order == ["outer", "inner"]
        assert torch.equal(study.logits(ids), plain)
        assert order == ["outer", "inner", "outer"]
    study.logits(ids)
    assert len(order) == 3
    with pytest.raises(ConfigError, match=r"returned \(1, 5\)"), study.hooks({"embed": lambda x, site: x[..., 0]}):
        study.logits(ids)


def test_an_edit_that_a_run_would_pass_by_is_refused() -> None:
    study, ids = study_of("llama"), random_ids(1, 5)
    with study.hooks({("ln1.hook_normalized", 1): 0.0}):
        study.run_with_cache(ids, ("q_input", 0))  # of another block
        for names in ("q_input", ("v_input", 1)):
            with pytest.raises(ConfigError, match="has no effect together with"):
                study.run_with_cache(ids, names)
        with pytest.raises(ConfigError, match="has no effect"):
            study.patch_paths(ids, random_ids(1, 5, seed=1), lambda logits: logits[0, -1, 3], ["L0H1"], ["L1H0.k"])


def test_a_layer_may_be_any_whole_number() -> None:
    study = study_of("llama")
    assert select(study.config, ("pattern", np.int64(1))) == ["blocks.1.attn.hook_pattern"]  # type: ignore[arg-type]


def test_an_edit_is_told_where_it_stands() -> None:
    study = study_of("gpt2")
    sites = []
    with study.hooks({("pattern", 1): lambda pattern, site: sites.append(site)}):
        study.logits(random_ids(1, 5))
    [site] = sites
    assert (site.name, site.layer, site.positions.tolist()) == ("blocks.1.attn.hook_pattern", 1, [0, 1, 2, 3, 4])
    assert site.axes == ("batch", "head", "pos", "slot")


@pytest.mark.parametrize("name", ["z", "resid_pre", "resid_mid", "mlp_in"])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_by_activations_are_those_of_a_small_step(preset: str, name: str) -> None:
    model = random_model(tiny_config(preset)).double()
    study, ids = Study.of(model), random_ids(1, 6)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 7] - logits[0, -1, 3]

    value, cache, gradients = study.gradients(ids, metric, ["resid_pre", "resid_mid", "mlp_in", "z", "embed"])
    direction = torch.randn(cache[name, 0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with study.hooks({(name, 0): lambda x, site: x + 1e-6 * direction}):
        moved = metric(study.logits(ids))
    torch.testing.assert_close((moved - value) / 1e-6, (gradients[name, 0] * direction).sum(), rtol=1e-4, atol=1e-6)
    assert not cache[name, 0].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_has_gradients_by_its_activations_too() -> None:
    model, ids = random_model(tiny_config("llama")), random_ids(1, 6)
    names = ["z", "mlp_in", ("resid_post", -1)]
    _, _, expected = Study.of(model).gradients(ids, lambda logits: logits[0, -1, 7], names)
    _, _, found = Study.of(model.requires_grad_(False)).gradients(ids, lambda logits: logits[0, -1, 7], names)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
        assert gradient.abs().max() > 0


def test_what_escapes_can_be_learned_through() -> None:
    study, ids = study_of("modern"), random_ids(1, 6)
    vector = torch.zeros(32, requires_grad=True)
    with study.hooks({("resid_pre", 1): lambda x, site: x + vector}):
        study.losses(ids, grad=True).mean().backward()
    assert vector.grad is not None and vector.grad.abs().max() > 0
    assert not study.losses(ids).requires_grad


@pytest.mark.parametrize("preset", PRESETS)
def test_activations_kept_while_writing_are_those_of_one_forward(preset: str) -> None:
    study = written(preset)
    study.model.double()
    names = ["pattern", "resid_post", "attn_scores", ("result", 0)]
    completion, cache = study.generate("ABCDEF", names, max_new_tokens=8, seed=3)
    assert len(completion.ids) == 8
    text = [*completion.prompt_ids, *completion.ids[:-1]]
    _, whole = study.run_with_cache(text, names)
    assert list(cache) == list(whole)
    for name in whole:
        torch.testing.assert_close(cache[name], whole[name])


def test_nothing_written_leaves_nothing_to_keep() -> None:
    study = written("llama")
    with pytest.raises(ConfigError, match="no token was generated"):
        study.generate("ABC", "z", max_new_tokens=0)
    completion, cache = study.generate("ABC", max_new_tokens=0)
    assert completion.ids == [] and not len(cache)


def test_edits_reach_what_is_written_with_a_cache() -> None:
    study = written("modern")
    towards = study.model.unembed.weight[20].detach() * 50
    with study.hooks({("resid_post", -1): lambda x, site: x + towards}):
        completion, _ = study.generate("ABC", max_new_tokens=5, temperature=0.0)
        assert study.logits("ABC").argmax(-1).unique().tolist() == [20]
    assert completion.ids == [20] * 5
    plain, _ = study.generate("ABC", max_new_tokens=5, temperature=0.0)
    assert plain.ids != completion.ids


def test_a_compiled_callable_beside_the_model_is_left_alone() -> None:
    model = random_model(tiny_config("modern"))
    compiled = torch.compile(model, backend="eager")
    ids, fired = random_ids(1, 6), []
    with torch.no_grad():
        before = compiled(ids)
    study = Study.of(compiled)  # type: ignore[arg-type]
    with study.hooks({("z", 0): lambda z, site: fired.append(site.name)}):
        study.logits(ids)
    assert fired == ["blocks.0.attn.hook_z"]
    with torch.no_grad():
        assert torch.equal(compiled(ids), before)


def test_a_plain_forward_runs_no_hook_and_the_same_operations_after_a_study_as_before() -> None:
    from torch.profiler import ProfilerActivity, profile

    model, ids = random_model(tiny_config("modern")), random_ids(1, 6)

    def operations() -> list[str]:
        with profile(activities=[ProfilerActivity.CPU]) as record, torch.no_grad():
            model(ids)
        return [event.name for event in record.events()]

    operations()
    before = operations()
    study = Study.of(model)
    with study.hooks({"resid_post": 0.0}):
        study.run_with_cache(ids)
        assert operations() == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_model_in_training_stays_in_training_and_is_watched_without_dropout() -> None:
    model = random_model(tiny_config("gpt2", dropout=0.5)).train()
    model.trunk.blocks[0].eval()
    study, ids = Study.of(model), random_ids(1, 6)
    assert torch.equal(study.logits(ids), study.logits(ids))
    assert model.training and model.trunk.blocks[1].mlp.training
    assert not model.trunk.blocks[0].training and not model.trunk.blocks[0].mlp.training


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", DataError, "has no tokens"),
        (["AB", "ABC"], DataError, "texts of 2, 3 tokens"),
        ([[1, 2], [3]], DataError, "rows of equal length"),
        ([61], DataError, "61 .. 61: expected 0 .. 60"),
        ([0.5], DataError, "have dtype torch.float32; expected an integer type"),
        ("A" * 25, ConfigError, "25 tokens do not fit"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        written("gpt2").logits(text)  # type: ignore[arg-type]


def test_texts_become_tokens_and_tokens_text() -> None:
    study = written("llama")
    assert study.tokens("AB") == ["A", "B"]
    assert study.token_id("A") == 17 == study.token_id(17)
    with pytest.raises(DataError, match=r"is 2 tokens \(A | B\)"):
        study.token_id("AB")
    with pytest.raises(DataError, match="2 texts; give one text"):
        study.tokens(["AB", "BA"])
    with pytest.raises(ConfigError, match="no tokenizer"):
        study_of("llama").logits("AB")
    assert study.losses(["AB", "BA"]).shape == (2, 1)


def test_the_docs_list_every_activation_with_its_axes() -> None:
    text = (Path(__file__).parents[2] / "docs/study.md").read_text(encoding="utf-8")
    rows = {name: axes.split() for name, axes in re.findall(r"^\| `([\w.{}]*hook_\w+)` \| ([\w ]+) \|", text, re.M)}
    there = {}
    for preset in PRESETS:
        for name, activation in activations(tiny_config(preset)).items():
            there[re.sub(r"^blocks\.\d+", "blocks.{i}", name)] = list(activation.axes)
    assert rows == there
