"""Rollout and value-weighted flow, against products multiplied out slot by slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.attribution.flow import rollout, value_flow
from minigpt.internals.study import Study
from planted import induction_model
from toys import PRESETS, random_ids, random_model, tiny_config


def study_of(preset: str) -> Study:
    return Study.of(random_model(tiny_config(preset)).double())


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_sum_to_one_and_nothing_comes_from_later(preset: str) -> None:
    study, ids = study_of(preset), random_ids(1, 9)
    for measure in (rollout, value_flow):
        for layer in (0, -1):
            values = measure(study, ids, layer).values
            np.testing.assert_allclose(values.sum(-1), 1)
            assert (values >= 0).all() and not np.triu(values, 1).any()


def test_rollout_multiplies_mean_patterns_mixed_with_the_identity() -> None:
    study, ids = study_of("llama"), random_ids(1, 5)
    _, cache = study.run_with_cache(ids, "pattern")
    first, second = (0.5 * cache["pattern", layer][0].mean(0).numpy() + 0.5 * np.eye(5) for layer in (0, 1))
    result = rollout(study, ids)
    np.testing.assert_allclose(result.values, second @ first)
    np.testing.assert_allclose(rollout(study, ids, 0).values, first)
    assert result.axes[0].labels == [f"{i} {id}" for i, id in enumerate(ids[0].tolist())]


@pytest.mark.parametrize("preset", PRESETS)
def test_value_flow_measures_the_vectors_that_make_the_stream(preset: str) -> None:
    study, ids = study_of(preset), random_ids(1, 5)
    _, cache = study.run_with_cache(ids, ["pattern", "v", "resid_pre", "resid_mid"])
    attn = study.model.trunk.blocks[0].attn
    added = torch.zeros(5, 5, 32, dtype=torch.float64)
    for i in range(5):
        added[i, i] += cache["resid_pre", 0][0, i]
        for j in range(i + 1):
            z = torch.cat(
                [cache["pattern", 0][0, h, i, j] * cache["v", 0][0, j, h * attn.n_kv_head // 4] for h in range(4)]
            )
            added[i, j] += z @ attn.proj.weight.detach().T
    bias = 0 if attn.proj.bias is None else attn.proj.bias.detach()
    torch.testing.assert_close(added.sum(1) + bias, cache["resid_mid", 0][0])
    lengths = added.norm(dim=-1).numpy()
    np.testing.assert_allclose(value_flow(study, ids, 0).values, lengths / lengths.sum(1, keepdims=True))


def test_flow_through_the_planted_heads_goes_where_they_look() -> None:
    study = Study.of(induction_model().double())
    flow = value_flow(study, [3, 1, 4, 2, 3, 1, 4])
    # The second 4 brought along the 1 before it, and by induction it looks at the 2, which brought along the first 4.
    sources = sorted(((flow["6 4", source], source) for source in flow.axes[1].labels), reverse=True)
    assert [source for _, source in sources[:4]] == ["5 1", "6 4", "2 4", "3 2"]
    assert sources[3][0] > 10 * sources[4][0]


def test_a_layer_that_is_not_there_and_several_texts_are_refused() -> None:
    study = study_of("gpt2")
    with pytest.raises(ConfigError, match="layer: 2"):
        rollout(study, random_ids(1, 5), 2)
    with pytest.raises(DataError, match="one text"):
        value_flow(study, random_ids(2, 5))
