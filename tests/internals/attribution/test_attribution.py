"""What the stream and a logit are made of: sums that come out, terms checked against separate computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.attribution.attribution import attribute_logit
from minigpt.internals.attribution.decomposition import UNITS, accumulated, components
from minigpt.internals.study import Study
from toys import PRESETS, random_ids, random_model, tiny_config

# Beside the presets: what each of them leaves at its default.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{preset: (preset, {}) for preset in PRESETS},
    "gpt2 without bias": ("gpt2", {"bias": False}),
    "gpt2 untied, two key heads": ("gpt2", {"tie_embeddings": False, "n_kv_head": 2}),
    "llama with bias, tied": ("llama", {"bias": True, "tie_embeddings": True}),
    "llama capped, layernorm": ("llama", {"logit_softcap": 20.0, "norm": "layernorm"}),
    "modern with learned positions": ("modern", {"position": "learned", "norm_weight": True}),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def study_of(shape: str, seed: int = 0) -> Study:
    preset, changes = SHAPES[shape]
    return Study.of(random_model(tiny_config(preset, **changes), seed))


IDS = random_ids(1, 9)


@shapes
@pytest.mark.parametrize("by", UNITS)
def test_components_sum_to_the_stream(shape: str, by: Any) -> None:
    study = study_of(shape)
    _, cache = study.run_with_cache(IDS)
    for at in (("resid_post", -1), ("resid_mid", 1), ("resid_pre", 1), ("resid_pre", 0)):
        result = components(study, IDS, by, at)
        stream = cache[at][0].double().numpy()
        rounding = 1e-6 * np.abs(stream).max()  # the stream's numbers are up to 30
        np.testing.assert_allclose(result.values.sum(0), stream, rtol=0, atol=rounding)
        assert result.notes["remainder"] <= rounding


@shapes
def test_components_are_what_silencing_each_takes_away(shape: str) -> None:
    study = study_of(shape)
    result = components(study, IDS, "component")
    assert result.axes[0].labels[-4:] == ["L0 attn", "L0 mlp", "L1 attn", "L1 mlp"]
    _, whole = study.run_with_cache(IDS, ("resid_post", -1))
    with study.hooks({("mlp_out", 1): 0.0}):
        _, without = study.run_with_cache(IDS, ("resid_post", -1))
    taken = (whole["resid_post", -1] - without["resid_post", -1])[0].numpy()
    np.testing.assert_allclose(result.values[-1], taken, rtol=1e-4, atol=1e-4)


def test_labels_name_layers_heads_neurons_and_biases() -> None:
    study = study_of("gpt2")
    labels = {by: components(study, IDS, by).axes[0].labels for by in UNITS}
    assert labels["layer"] == ["embed", "pos_embed", "0", "1"]
    heads = [f"L0H{head}" for head in range(4)]
    assert labels["head"][:9] == ["embed", "pos_embed", *heads, "L0 attn bias", "L0 mlp", "L1H0"]
    assert len(labels["neuron"]) == 2 + 2 * (1 + 128 + 1)
    assert labels["neuron"][2:4] == ["L0 attn", "L0N0"] and labels["neuron"][-2:] == ["L1N127", "L1 mlp bias"]
    modern = components(study_of("modern"), IDS, "layer").axes[0].labels
    assert modern == ["embed", "bigram_embed", "trigram_embed", "0", "1"]


@shapes
def test_shares_of_the_stream_sum_to_one_and_norms_are_lengths(shape: str) -> None:
    study = study_of(shape)
    vectors = components(study, IDS, "head").values
    np.testing.assert_allclose(components(study, IDS, "head", read="share").values.sum(0), 1.0, rtol=1e-5)
    norms = components(study, IDS, "head", read="norm", positions=[-1, 2])
    np.testing.assert_allclose(norms.values, np.linalg.norm(vectors, axis=-1)[:, [8, 2]], rtol=1e-6)
    assert norms.axes[1].labels == [f"8 {int(IDS[0, 8])}", f"2 {int(IDS[0, 2])}"]


def test_edits_of_the_stream_are_a_term_of_their_own() -> None:
    study = study_of("llama")
    with study.hooks({("resid_post", 0): lambda x, site: x + 3.0}):
        result = components(study, IDS, "head")
        attributed = attribute_logit(study, IDS, 7, by="head")
    assert result.axes[0].labels[-1] == "edits"
    np.testing.assert_allclose(result.values[-1], 3.0, rtol=1e-4)
    assert abs(attributed.notes["remainder"]) < 1e-4


def test_the_accumulated_stream_is_read_once_at_each_place() -> None:
    study = study_of("gpt2")
    result = accumulated(study, IDS)
    assert result.axes[0].labels == ["0 pre", "0 mid", "0 post", "1 mid", "1 post"]
    _, cache = study.run_with_cache(IDS)
    assert np.array_equal(result.values[1], cache["resid_mid", 0][0].double().numpy())
    assert accumulated(study, IDS, "resid_pre").axes[0].labels == ["0 pre", "1 pre"]
    assert accumulated(study, IDS, ["resid_post", "resid_pre"]).axes[0].labels == ["0 pre", "0 post", "1 post"]


# Direct logit attribution.


def before_the_cap(study: Study, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) by the model's plain forward, in which nothing is taken apart."""
    with torch.no_grad():
        return study.model.unembed.project(study.model.trunk(ids))[0]


@shapes
@pytest.mark.parametrize("by", UNITS)
def test_attributions_sum_to_the_logit_before_any_cap(shape: str, by: Any) -> None:
    study = study_of(shape)
    logits = before_the_cap(study, IDS)
    result = attribute_logit(study, IDS, 7, by=by)
    assert result.values.sum() == pytest.approx(float(logits[-1, 7]), abs=1e-4)
    assert result.notes["sum"] + result.notes["remainder"] == pytest.approx(result.notes["logit"])
    assert abs(result.notes["remainder"]) < 1e-4
    contrast = attribute_logit(study, IDS, 7, 11, position=3, by=by)
    assert contrast.values.sum() == pytest.approx(float(logits[3, 7] - logits[3, 11]), abs=1e-4)
    everywhere = attribute_logit(study, IDS, 7, 11, position=None, by=by)
    np.testing.assert_allclose(everywhere.values.sum(0), (logits[:, 7] - logits[:, 11]).numpy(), atol=1e-4)
    assert everywhere.notes["remainder"] < 1e-4


@shapes
@torch.no_grad()
def test_an_attribution_is_the_change_of_the_logit_by_that_term_at_the_same_scale(shape: str) -> None:
    study = study_of(shape)
    result = attribute_logit(study, IDS, 7)
    _, cache = study.run_with_cache(IDS, ["ln_final.hook_scale", "attn_out"])
    written = cache["attn_out", 1]
    # Taken out of the last stream only, with the norm's scale held at what it was: what the definition says.
    edits = {("resid_post", -1): lambda x, site: x - written, "ln_final.hook_scale": cache["ln_final.hook_scale"]}
    seen: list[torch.Tensor] = []
    with study.hooks({**edits, "ln_final.hook_normalized": lambda x, site: seen.append(x.clone())}):
        study.logits(IDS)
        study_norm = study.model.trunk.norm
        hidden = seen[0][0, -1] * (1 if study_norm.weight is None else study_norm.weight)
        bias = getattr(study_norm, "bias", None)
        without = (hidden + (0 if bias is None else bias)) @ study.model.unembed.weight[7]
    assert result["L1 attn"] == pytest.approx(float(before_the_cap(study, IDS)[-1, 7] - without), abs=1e-4)


def test_the_hand_worked_case() -> None:
    study = study_of("gpt2 without bias")
    model = study.model
    with torch.no_grad():
        for block in model.trunk.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
        model.trunk.embed.weight.zero_()
        model.trunk.position.weight.zero_()
        model.trunk.norm.weight.fill_(2.0)
        model.trunk.embed.weight[0, :2] = torch.tensor([3.0, 1.0])
    # The stream is (3, 1, 0, ... 0): 32 channels, mean 1/8, variance 10/32 - 1/64 = 19/64; unembedding tied.
    # logit_0 = 2 ((3 - 1/8) 3 + (1 - 1/8) 1) / sqrt(19/64 + 1e-5)
    result = attribute_logit(study, [0], 0)
    scale = (19 / 64 + 1e-5) ** 0.5
    assert result.notes["scale"] == pytest.approx(scale, rel=1e-6)
    assert result["embed"] == pytest.approx(2 * (3 * 2.875 + 0.875) / scale, rel=1e-6)
    assert result["L0 attn"] == result["L1 mlp"] == result["pos_embed"] == 0


def test_the_final_norms_bias_has_a_row_and_the_cap_is_told() -> None:
    gpt2 = study_of("gpt2")
    result = attribute_logit(gpt2, IDS, 7, 11)
    weight = gpt2.model.unembed.weight
    expected = float((gpt2.model.trunk.norm.bias @ (weight[7] - weight[11])).detach())
    assert result["final norm bias"] == pytest.approx(expected, abs=1e-5)
    assert "cap" not in result.notes
    modern = study_of("modern")
    notes = attribute_logit(modern, IDS, 7).notes
    assert notes["cap"] == 15.0
    assert notes["after the cap"] == pytest.approx(float(modern.logits(IDS)[0, -1, 7]), abs=1e-5)
    assert notes["after the cap"] == pytest.approx(15 * np.tanh(notes["logit"] / 15), abs=1e-4)


def test_only_the_largest_neurons_have_rows_and_the_rest_is_summed() -> None:
    study = study_of("gpt2")
    every = attribute_logit(study, IDS, 7, by="neuron", top=256)
    few = attribute_logit(study, IDS, 7, by="neuron", top=5)
    neurons = {label: every[label] for label in every.axes[0].labels if "N" in label}
    assert len(neurons) == 256
    largest = sorted(neurons, key=lambda label: -abs(neurons[label]))[:5]
    assert {label for label in few.axes[0].labels if "N" in label} == set(largest)
    assert few["other neurons"] == pytest.approx(sum(v for k, v in neurons.items() if k not in largest), abs=1e-6)
    assert few["L1 mlp bias"] == every["L1 mlp bias"]
    assert sum("N" in label for label in attribute_logit(study, IDS, 7, by="neuron").axes[0].labels) == 20
    heads = attribute_logit(study, IDS, 7, by="head", top=3)
    assert len(heads.axes[0].labels) == 5 and heads.axes[0].labels[-2:] == ["other heads", "final norm bias"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"by": "haed"}, ConfigError, "not one of layer, component, head, neuron"),
        ({"position": 9}, ConfigError, "9 is outside the text; expected -9 .. 8"),
        ({"top": 0}, ConfigError, "expected a positive number"),
        ({"answer": 61}, DataError, "0 .. 60"),
        ({"text": random_ids(2, 4)}, DataError, "2 texts"),
    ],
)
def test_what_cannot_be_attributed_is_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attribute_logit(study_of("llama"), **{"text": IDS, "answer": 7, **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda study: components(study, IDS, at="mlp_out"), "one point of the residual stream"),
        (lambda study: components(study, IDS, at="resid_post"), "one point of the residual stream"),
        (lambda study: components(study, IDS, read="lenght"), "not one of vector, norm, share"),
        (lambda study: accumulated(study, IDS, "mlp_out"), "expected some of resid_pre"),
        (lambda study: accumulated(study, IDS, ()), "nothing"),
    ],
)
def test_what_is_no_place_in_the_stream_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(study_of("llama"))
