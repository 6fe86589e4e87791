"""Taking parts away and measuring what a change does, against edits made one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.causal.ablation import ablate
from minigpt.internals.causal.effect import changes, effect
from minigpt.internals.study import Study
from toys import PRESETS, random_ids, random_model, tiny_config


def study_of(preset: str) -> Study:
    return Study.of(random_model(tiny_config(preset)).double())


def test_what_a_change_does_worked_by_hand() -> None:
    third, half = np.log(1 / 3), np.log(0.5)
    before = torch.tensor([[[0.0, 0, 0], [0.0, 0, 5]]], dtype=torch.float64)
    after = torch.tensor([[[half, half, -np.inf], [9.0, 0, 5]]], dtype=torch.float64).clamp(min=-1e3)
    ids = torch.tensor([[0, 1]])
    loss, divergence, flips = changes(before, after, ids).tolist()
    assert loss == pytest.approx(third - half)  # token 1 cost -ln 1/3, now -ln 1/2
    second = torch.nn.functional.kl_div(after[0, 1].log_softmax(-1), before[0, 1].softmax(-1), reduction="sum")
    first = 2 / 3 * (third - half) + 1 / 3 * (third + 1e3)
    assert divergence == pytest.approx((first + float(second)) / 2, rel=1e-3)
    assert flips == 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_the_effect_of_an_edit_is_measured_on_loss_distribution_and_answer(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 9)
    nothing = effect(study, ids, {("z", 0): lambda z, site: z}, answer=3)
    assert np.abs(nothing.values).max() < 1e-12
    edits = {("z", 0): 0.0}
    found = effect(study, ids, edits, answer=[3, 5], versus=7, position=4)
    before, loss = study.logits(ids), study.loss(ids)
    with study.hooks(edits):
        after, changed = study.logits(ids), study.loss(ids)
    assert found["loss"] == pytest.approx(changed - loss)
    p, q = torch.distributions.Categorical(logits=before), torch.distributions.Categorical(logits=after)
    assert found["KL"] == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()))
    moved = (after - before)[:, 4]
    assert found["logit difference"] == pytest.approx(float(moved[0, 3] - moved[0, 7] + moved[1, 5] - moved[1, 7]) / 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_ablating_a_head_is_subtracting_what_it_writes(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 9)
    found = ablate(study, ids)
    assert found.axes[0].labels == [
        *(f"L{layer}{part}" for layer in range(2) for part in ("H0", "H1", "H2", "H3", " mlp"))
    ]
    _, cache = study.run_with_cache(ids, "result")
    for layer in range(2):
        for head in range(4):
            written = cache["result", layer][:, :, head]
            expected = effect(study, ids, {("attn_out", layer): lambda out, site, written=written: out - written})
            np.testing.assert_allclose(found.values[5 * layer + head], expected.values, atol=1e-10)
        expected = effect(study, ids, {("mlp_out", layer): 0.0})
        np.testing.assert_allclose(found.values[5 * layer + 4], expected.values, atol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_mean_and_resampled_ablations_put_the_samples_values_there(preset: str) -> None:
    study, ids, sample = study_of(preset), random_ids(2, 9), random_ids(3, 9, seed=1)
    _, other = study.run_with_cache(sample, ["z", "mlp_out"])

    def head_1(value: torch.Tensor) -> Any:
        def edit(z: torch.Tensor, site: object) -> None:
            z[:, :, 1] = value[..., 1, :]

        return edit

    found = ablate(study, ids, "mean", sample=sample)
    expected = effect(study, ids, {("z", 1): head_1(other["z", 1].mean((0, 1)))})
    np.testing.assert_allclose(found.values[6], expected.values, atol=1e-10)
    expected = effect(study, ids, {("mlp_out", 0): other["mlp_out", 0].mean((0, 1))})
    np.testing.assert_allclose(found.values[4], expected.values, atol=1e-10)

    one = sample[:1]  # with one row to take from, each row gets it
    found = ablate(study, ids, "resample", sample=one, parts="head")
    expected = effect(study, ids, {("z", 1): head_1(other["z", 1][:1])})
    np.testing.assert_allclose(found.values[5], expected.values, atol=1e-10)

    swapped = ablate(study, ids, "resample", parts="mlp")  # of two rows each gets the other's
    _, own = study.run_with_cache(ids, "mlp_out")
    expected = effect(study, ids, {("mlp_out", 1): own["mlp_out", 1].flip(0)})
    np.testing.assert_allclose(swapped.values[1], expected.values, atol=1e-10)


def test_what_cannot_be_taken_away_is_refused() -> None:
    study, ids = study_of("modern"), random_ids(2, 9)
    with pytest.raises(ConfigError, match="how: 'median'"):
        ablate(study, ids, "median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="parts: 'heads'"):
        ablate(study, ids, parts="heads")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="resample needs at least two rows"):
        ablate(study, ids[:1], "resample")
    with pytest.raises(DataError, match="sample: 4 tokens"):
        ablate(study, ids, "resample", sample=ids[:, :4])
    with pytest.raises(ConfigError, match="call it outside"), study.hooks({("z", 0): 0.0}):
        ablate(study, ids)
    with pytest.raises(DataError, match="needs at least two tokens"):
        ablate(study, ids[:, :1])
