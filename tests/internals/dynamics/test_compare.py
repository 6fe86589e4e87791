"""Two models side by side: against themselves, against what is done to one of them, and by the formula."""

from __future__ import annotations

import copy

import pytest
import torch

from minigpt.errors import DataError
from minigpt.internals.dynamics.compare import cka
from minigpt.internals.study import Study
from minigpt.tokenizer.plain import CharTokenizer
from toys import PRESETS, random_ids, random_model, tiny_config


def study_of(preset: str, seed: int = 0, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes), seed))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_is_like_itself(preset: str) -> None:
    study, ids = study_of(preset), random_ids(4, 20)
    found = study.compare(study_of(preset), ids)
    assert abs(found.losses.values).max() == 0 and found.losses.notes["mean"] == 0
    assert [found.similarity[layer, layer] for layer in ("embed", "0", "1")] == pytest.approx([1, 1, 1])
    assert found.cosine is not None and found.cosine.values.tolist() == pytest.approx([1, 1, 1])
    assert found.similarity["embed", "1"] == pytest.approx(found.similarity["1", "embed"]) != pytest.approx(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_changed_in_one_block_shows_from_that_block_on(preset: str) -> None:
    study, ids = study_of(preset), random_ids(1, 20)
    other = Study.of(copy.deepcopy(study.model))
    with torch.no_grad():
        other.model.trunk.blocks[1].mlp.down.weight.mul_(-1)
    found = study.compare(other, ids)
    assert found.losses.axes[0].labels[0] == f"1 {int(ids[0, 1])}" and len(found.losses.axes[0].labels) == 19
    expected = other.losses(ids)[0] - study.losses(ids)[0]
    assert found.losses.values == pytest.approx(expected.numpy(), abs=1e-6)
    assert found.cosine is not None
    assert found.cosine["embed"] == found.cosine["0"] == pytest.approx(1) and found.cosine["1"] < 0.99


def test_similarity_is_the_formulas_and_knows_no_turns() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, width, generator=generator) for width in (6, 4))
    a, b = (z.double() - z.double().mean(0) for z in (x, y))
    gram = [z @ z.T for z in (a, b)]  # the same by products of tokens instead of channels
    expected = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert cka(x, y) == pytest.approx(float(expected)) == cka(y, x)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert cka(x, 3 * x @ turn + 5) == pytest.approx(1, rel=1e-5)
    assert cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]))) < 0.9


def test_models_of_other_shapes_are_compared_layer_by_layer() -> None:
    found = study_of("gpt2").compare(study_of("modern", n_layer=3, n_embd=48), random_ids(4, 20))
    assert found.similarity.values.shape == (3, 4) and found.cosine is None
    assert found.losses.axes[0].name == "position"
    assert "Similarity" in str(found) and "Cosine" not in str(found)
    assert found._repr_html_().count("<table>") == 2


def test_models_of_other_tokenizers_are_not_compared() -> None:
    model = random_model(tiny_config("gpt2"))
    one, other = (Study.of(model, CharTokenizer([chr(first + i) for i in range(61)])) for first in (48, 47))
    with pytest.raises(DataError, match="encode it as different tokens"):
        one.compare(other, "ABC")
