"""Which tokens matter: against small steps, edits by hand, and a model in which it is known."""

from __future__ import annotations

import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.attribution.saliency import Method, saliency
from minigpt.internals.study import Study
from toys import PRESETS, random_ids, random_model, tiny_config

IDS = random_ids(1, 9)


def study_of(preset: str, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes)))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("versus", "position"), [(None, -1), (11, -1), (11, 5)])
def test_integrated_gradients_are_complete_to_one_percent(preset: str, versus: int | None, position: int) -> None:
    study = study_of(preset)
    result = saliency(study, IDS, 7, versus, position)
    with torch.no_grad():
        logits = study.model(IDS)[0, position]
        tables = [t for t in (study.model.trunk.embed, study.model.trunk.bigram, study.model.trunk.trigram) if t]
        mean = sum(table.weight.mean(0) for table in tables)
        # The baseline by another way: all tokens and n-grams are the mean one.
        nothing = {name: 0.0 for name in study.table if name.endswith("gram_embed")}
        with study.hooks({**nothing, "hook_embed": mean}):
            without = study.logits(IDS)[0, position]
    change = (logits - without)[7] - (0 if versus is None else (logits - without)[versus])
    assert result.values.sum() == pytest.approx(float(change), abs=0.01 * abs(float(change)))
    assert result.notes["value"] - result.notes["baseline"] == pytest.approx(float(change), rel=1e-4)
    assert abs(result.notes["remainder"]) <= 0.01 * abs(float(change))


def test_integrated_gradients_are_complete_from_zero_and_from_another_text() -> None:
    study = study_of("gpt2")
    for baseline in ("zero", random_ids(1, 9, seed=4)):
        notes = saliency(study, IDS, 7, 11, baseline=baseline).notes
        assert abs(notes["remainder"]) <= 0.01 * abs(notes["value"] - notes["baseline"])
    expected = study.logits(random_ids(1, 9, seed=4))[0, -1]
    assert notes["baseline"] == pytest.approx(float(expected[7] - expected[11]), abs=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_all_methods_agree_where_the_answer_is_linear_in_the_tokens(preset: str) -> None:
    study = study_of(preset, logit_softcap=0.0)
    with torch.no_grad():
        for block in study.model.trunk.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
    with study.hooks({"ln_final.hook_scale": 2.0}):  # nothing is left that is not linear
        found = {method: saliency(study, IDS, 7, 11, method=method) for method in get_args(Method)}
        change = found["occlusion"].notes["value"] - found["occlusion"].notes["baseline"]
        for method in ("gradient_x_input", "integrated_gradients", "occlusion"):
            np.testing.assert_allclose(found[method].values[:-1], 0, atol=1e-6)
            assert found[method].values[-1] == pytest.approx(change, rel=1e-4)
    towards = (study.model.unembed.weight[7] - study.model.unembed.weight[11]).detach()
    norm = study.model.trunk.norm
    towards = towards if norm.weight is None else towards * norm.weight.detach()
    centred = towards - towards.mean() if preset == "gpt2" else towards
    assert found["gradient"].values[-1] == pytest.approx(float(centred.norm()) / 2, rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gradient_is_the_steepest_change_by_a_small_step(preset: str) -> None:
    study = study_of(preset)
    study.model.double()
    result = saliency(study, IDS, 7, 11, method="gradient")

    def value(shift: torch.Tensor) -> float:
        with study.hooks({"hook_embed": lambda x, site: x + shift}):
            logits = study.logits(IDS)[0, -1]
        return float(logits[7] - logits[11])

    slopes = []
    for channel in range(32):
        shift = torch.zeros(9, 32, dtype=torch.float64)
        shift[4, channel] = 1e-5
        slopes.append((value(shift) - value(-shift)) / 2e-5)
    assert result.values[4] == pytest.approx(float(np.linalg.norm(slopes)), rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_occlusion_is_what_is_lost_when_one_token_is_the_mean_one(preset: str) -> None:
    study = study_of(preset)
    result = saliency(study, IDS, 7, method="occlusion", position=6)
    with torch.no_grad():
        trunk = study.model.trunk
        tables = {"bigram": trunk.bigram, "trigram": trunk.trigram}
        means = {name: table.weight.mean(0) for name, table in tables.items() if table is not None}

        def occluded(mean: torch.Tensor) -> Any:
            def edit(x: torch.Tensor, site: object) -> torch.Tensor:
                x[:, 3] = mean
                return x

            return edit

        edits = {f"hook_{name}_embed": occluded(mean) for name, mean in means.items()}
        with study.hooks({**edits, "hook_embed": occluded(trunk.embed.weight.mean(0))}):
            without = study.logits(IDS)[0, 6, 7]
    assert result.values[3] == pytest.approx(float(study.logits(IDS)[0, 6, 7] - without), abs=1e-4)
    assert (result.values[7:] == 0).all()
    assert result.axes[0].labels[3] == f"3 {int(IDS[0, 3])}"


def test_gradient_times_input_is_the_integral_in_one_step() -> None:
    study = study_of("llama")
    result = saliency(study, IDS, 7, method="gradient_x_input", baseline="zero")
    _, cache, gradients = study.gradients(IDS, lambda logits: logits[0, -1, 7], "embed")
    expected = (cache["embed"] * gradients["embed"]).sum(-1)[0]
    np.testing.assert_allclose(result.values, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_n_gram_embeddings_count_for_the_token_they_end_in() -> None:
    study = study_of("modern")

    def only_at_4(x: torch.Tensor, site: object) -> torch.Tensor:
        x[:, :4] = x[:, 5:] = 0
        return x

    with study.hooks({"hook_embed": 0.0, "trigram_embed": 0.0, "bigram_embed": only_at_4}):
        result = saliency(study, IDS, 7, method="gradient_x_input", baseline="zero")
        _, cache, gradients = study.gradients(IDS, lambda logits: logits[0, -1, 7], "bigram_embed")
    assert np.flatnonzero(result.values).tolist() == [4]
    expected = (cache["bigram_embed"] * gradients["bigram_embed"]).sum(-1)[0, 4]
    assert result.values[4] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "grad"}, ConfigError, "not one of gradient, gradient_x_input"),
        ({"position": 9}, ConfigError, "9 is outside the text; expected -9 .. 8"),
        ({"answer": 99}, DataError, "0 .. 60"),
        ({"baseline": random_ids(1, 4)}, DataError, "4 tokens, but the text has 9"),
        ({"text": random_ids(2, 4)}, DataError, "2 texts"),
    ],
)
def test_what_cannot_be_explained_is_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        saliency(study_of("gpt2"), **{"text": IDS, "answer": 7, **arguments})


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_many_forwards_in_small_parts_give_the_same(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saliency(study_of("llama"), IDS, 7, method=method)
    monkeypatch.setattr(sys.modules[saliency.__module__], "AT_ONCE", 20)  # two texts of nine tokens
    np.testing.assert_allclose(saliency(study_of("llama"), IDS, 7, method=method).values, whole.values, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    study = study_of("modern")
    for method in get_args(Method):
        saliency(study, IDS, 7, method=method)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in study.model.parameters())
    assert not study.watch().edits
