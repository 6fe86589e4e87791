"""Patching: the fast way against one edited forward per site, and against what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.causal import resume
from minigpt.internals.causal.effect import kl, logit_difference, loss
from minigpt.internals.causal.patching import HEADS, SITES, STREAM, attribution_patch, patch, rank_correlation
from minigpt.internals.study import Study
from toys import PRESETS, random_ids, random_model, tiny_config

KINDS = ["resid_mid", "resid_post"]
ANSWER = logit_difference(3, 5)


def study_of(preset: str, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes)))


CLEAN, CORRUPTED = random_ids(2, 5), random_ids(2, 5, seed=1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("at", SITES)
def test_the_fast_way_equals_one_edited_forward_a_site(preset: str, at: str) -> None:
    study = study_of(preset, n_layer=3, n_head=2, n_kv_head=2 if preset == "gpt2" else 1)
    every = ("layer", "pos") if at in STREAM else ("layer", "head", "pos")
    cases = [(loss(), every), (logit_difference(3, 5, 2), every), (ANSWER, ("layer",)), (ANSWER, every[:2])]
    for metric, by in cases:
        fast = patch(study, CLEAN, CORRUPTED, metric, at, by)
        slow = patch(study, CLEAN, CORRUPTED, metric, at, by, slow=True)
        np.testing.assert_allclose(fast.values, slow.values, atol=1e-4)
        assert np.abs(slow.values).max() > 1e-3
        assert fast.axes == slow.axes and fast.notes == slow.notes


@pytest.mark.parametrize("preset", PRESETS)
def test_patching_everything_gives_the_clean_text_and_nothing_the_corrupted(preset: str) -> None:
    study = study_of(preset)
    for metric in (ANSWER, loss(), kl(), kl(None), lambda logits: logits[:, -1, 0].sum()):
        found = patch(study, CLEAN, CORRUPTED, metric, "resid_pre", ("layer",))
        whole = found.notes["clean"] - found.notes["corrupted"]
        np.testing.assert_allclose(found.values, whole, atol=1e-4)
        nothing = patch(study, CORRUPTED, CORRUPTED, metric, "z", ("layer", "head", "pos"))
        np.testing.assert_allclose(nothing.values, 0, atol=1e-5)
    assert abs(whole) > 0.01


def test_one_changed_token_is_all_at_the_beginning_and_at_the_last_position_in_the_end() -> None:
    study = study_of("llama")
    corrupted = CLEAN.clone()[:1]
    corrupted[0, 2] = 9
    found = patch(study, CLEAN[:1], corrupted, ANSWER, "resid_pre")
    whole = found.notes["clean"] - found.notes["corrupted"]
    np.testing.assert_allclose(found.values[0], [0, 0, whole, 0, 0], atol=1e-5)
    late = patch(study, CLEAN[:1], corrupted, ANSWER, "resid_post")
    np.testing.assert_allclose(late.values[-1], [0, 0, 0, 0, whole], atol=1e-5)
    token = study.tokens(CLEAN[:1])[2]
    assert found.axes[1].labels[2] == f"2 {token}|9" and found[("0", f"2 {token}|9")] == pytest.approx(whole, abs=1e-5)


def test_small_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of("modern", n_layer=3)
    large = patch(study, CLEAN, CORRUPTED, ANSWER, "v", ("layer", "head", "pos"))
    monkeypatch.setattr(resume, "TOKENS", 20)
    small = patch(study, CLEAN, CORRUPTED, ANSWER, "v", ("layer", "head", "pos"))
    np.testing.assert_allclose(large.values, small.values, atol=1e-5)


def test_open_edits_count() -> None:
    study = study_of("gpt2")
    with study.hooks({("mlp_out", 0): 0.0}):
        found = patch(study, CLEAN, CORRUPTED, ANSWER, "z", ("layer", "head"))
        slow = patch(study, CLEAN, CORRUPTED, ANSWER, "z", ("layer", "head"), slow=True)
    np.testing.assert_array_equal(found.values, slow.values)
    without = patch(study, CLEAN, CORRUPTED, ANSWER, "z", ("layer", "head"))
    assert np.abs(found.values - without.values).max() > 1e-2


@pytest.mark.parametrize("preset", PRESETS)
def test_attribution_is_the_slope_of_patching(preset: str) -> None:
    """A clean run next to the corrupted one: there the guess is exact."""
    study = Study.of(random_model(tiny_config(preset)).double())
    embed = study.model.trunk.embed.weight
    with torch.no_grad():
        embed[7] = embed[3] + 1e-5 * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, corrupted = [3, 3, 9, 8, 3], [3, 7, 9, 8, 3]
    if preset == "modern":  # pairs and triples have embeddings of their own, which are not next to each other
        study.model.trunk.bigram.weight.data.zero_()
        study.model.trunk.trigram.weight.data.zero_()
    metric = logit_difference(4, 6)
    for at in SITES:
        by = ("layer", "pos") if at in STREAM else ("layer", "head", "pos")
        found = attribution_patch(study, clean, corrupted, metric, at, by)
        guess, exact = found.values
        np.testing.assert_allclose(guess, exact, atol=1e-3 * np.abs(exact).max())
        assert found.notes["rank correlation"] > 0.95
        only = attribution_patch(study, clean, corrupted, metric, at, by, exact=False)
        np.testing.assert_array_equal(only.values, guess)
        assert only.axes == found.axes[1:]
    turned = attribution_patch(study, clean, corrupted, metric, "pattern", ("layer", "pos", "head"), exact=False)
    np.testing.assert_array_equal(turned.values.transpose(0, 2, 1), guess)


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation(np.array([1.0, 2, 30]), np.array([-5.0, 0, 0.1])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert rank_correlation(np.array([0.0, 1, 1, 2]), np.array([0.0, 1, 2, 3])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(rank_correlation(np.zeros(3), np.arange(3.0)))


def test_answers_may_differ_from_row_to_row() -> None:
    study = study_of("llama")
    each = patch(study, CLEAN, CORRUPTED, logit_difference([3, 4], [5, 6]), "z", ("layer", "head"))
    rows = [
        patch(study, CLEAN[i : i + 1], CORRUPTED[i : i + 1], logit_difference(3 + i, 5 + i), "z", ("layer", "head"))
        for i in range(2)
    ]
    np.testing.assert_allclose(each.values, (rows[0].values + rows[1].values) / 2, atol=1e-4)


def test_what_cannot_be_patched_is_refused() -> None:
    study = study_of("gpt2")
    with pytest.raises(DataError, match="1 x 5 tokens and 1 x 4 tokens"):
        patch(study, CLEAN[:1], CORRUPTED[:1, :4], ANSWER)
    with pytest.raises(ConfigError, match="at: 'zz'; expected one of"):
        patch(study, CLEAN, CORRUPTED, ANSWER, "zz")
    for by in (("head",), ("layer", "head"), ("layer", "slot"), "slot", "", ("layer", "pos", "pos")):
        with pytest.raises(ConfigError, match="by: "):
            patch(study, CLEAN, CORRUPTED, ANSWER, "resid_pre", by)
    with pytest.raises(ConfigError, match="position: 5"):
        patch(study, CLEAN, CORRUPTED, logit_difference(3, position=5))
    with pytest.raises(ConfigError, match="answer: 3 tokens for 2 texts"):
        patch(study, CLEAN, CORRUPTED, logit_difference([1, 2, 3]))
    with pytest.raises(ConfigError, match="metric: 3"):
        patch(study, CLEAN, CORRUPTED, 3)  # type: ignore[arg-type]
    assert set(SITES) == set(STREAM) | set(HEADS)


@pytest.mark.parametrize(
    ("at", "spellings"),
    [
        ("z", ["head", ["head"], ("layer", "head"), "layer,head", "head,layer", None]),
        ("resid_pre", ["pos", ("pos",), ("layer", "pos"), None]),
        ("v", ["head,pos", "head, pos", ["head", "pos"], ("layer", "head", "pos")]),
    ],
)
def test_axes_are_named_in_python_as_on_the_command_line(at: str, spellings: list) -> None:
    study = study_of("llama")
    first, *others = [patch(study, CLEAN, CORRUPTED, ANSWER, at, by) for by in spellings]
    guesses = [attribution_patch(study, CLEAN, CORRUPTED, ANSWER, at, by, exact=False) for by in spellings]
    assert first.axes[0].name == "layer"
    for other in others:
        assert other.axes == first.axes
        np.testing.assert_array_equal(other.values, first.values)
    for guess in guesses:
        assert guess.axes == first.axes
        np.testing.assert_array_equal(guess.values, guesses[0].values)
    with pytest.raises(ConfigError, match=f"for {at}."):
        patch(study, CLEAN, CORRUPTED, ANSWER, at, "token")


def test_kinds_of_heads_and_places_of_the_stream_are_named_as_on_the_command_line() -> None:
    study = study_of("modern")
    heads = study.heads(CLEAN.repeat(1, 2), kinds="previous, first", causal=False)
    assert list(heads.scores) == ["previous", "first"]
    one, other = (study.logit_lens(CLEAN[:1], at) for at in ("resid_mid,resid_post", KINDS))
    assert one.axes == other.axes
    assert study.accumulated(CLEAN[:1], "resid_mid,resid_post").axes == study.accumulated(CLEAN[:1], KINDS).axes
