"""Where units are most active, and what neurons say, against a pass that keeps everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.features import neurons
from minigpt.internals.study import Study
from minigpt.tokenizer.plain import CharTokenizer
from toys import PRESETS, random_ids, random_model, tiny_config

TOKENIZER = CharTokenizer([chr(48 + i) for i in range(61)])


def study_of(preset: str, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes)), TOKENIZER)


@pytest.mark.parametrize("preset", PRESETS)
def test_streaming_finds_what_sorting_everything_finds(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "AT_ONCE", 48)  # two windows of 24 a forward: six forwards, and the short last window
    study, text = study_of(preset), random_ids(1, 250)[0]
    found = study.top_contexts(("post", 1), 5, text=text)
    parts = [text[at : at + 24] for at in range(0, 250, 24)]
    whole = torch.cat([study.run_with_cache(part)[1]["post", 1][0] for part in parts])  # (250, neurons)
    values, places = whole.sort(dim=0, descending=True, stable=True)
    np.testing.assert_allclose(found.values, values[:5].T, rtol=1e-5, atol=1e-6)
    clear = (values[:5] - values[1:6]).abs().T.numpy() > 1e-5  # between equals either place is right
    clear[:, 1:] &= clear[:, :-1].copy()
    assert clear.mean() > 0.8
    assert (found.places == places[:5].T.numpy())[clear].all()
    assert found.axes[0].name == "neuron" and len(found.axes[0].labels) == study.config.n_inner


def test_a_neuron_planted_to_know_one_token_finds_it_and_shows_its_context() -> None:
    study = study_of("gpt2")
    mlp, ids = study.model.trunk.blocks[0].mlp, random_ids(1, 100)[0]
    ids[ids == 10] = 11
    ids[[30, 71]] = 10
    with torch.no_grad():  # neuron 3 sees the embedding of token 10 alone, far above all else
        study.model.trunk.position.weight.zero_()
        study.model.trunk.blocks[0].attn.proj.weight.zero_()
        study.model.trunk.embed.weight[:, 0] = 0
        study.model.trunk.embed.weight[10] = 0
        study.model.trunk.embed.weight[10, 0] = 9
        mlp.up.weight[3] = 0
        mlp.up.weight[3, 0] = 9
    found = study.top_contexts(("post", 0), 2, text=ids)
    assert sorted(found.places[3].tolist()) == [30, 71]
    rank = found.places[3].tolist().index(30)
    before, token, after = found.context(3, rank, before=3, after=2)
    text = TOKENIZER.decode(ids.tolist())
    assert (before, token, after) == (text[27:30], text[30], text[31:33])
    assert f"{before}[{token}]{after}" in found.show(3, before=3, after=2)
    # Windows are of 24 tokens: what the model did not see before 71 - that is, before 48 - is not shown.
    assert len(found.context(3, 1 - rank, before=50, after=50)[0]) == 71 - 48
    assert len(found.context(3, 1 - rank, before=50, after=50)[2]) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_the_direct_effect_is_the_change_of_the_logits_when_nothing_is_divided(preset: str) -> None:
    study, ids = study_of(preset, logit_softcap=0.0), random_ids(1, 6)
    told = study.neuron_effect(1, 7)
    assert told.values.shape == (61,) and told.axes[0].labels[17] == "17 A"

    # One step of the last block's neuron 7 with the final norm's scale held at 1 moves the logits by the effect.
    def step(post: torch.Tensor, site: object) -> None:
        post[..., 7] += 1

    with study.hooks({"ln_final.hook_scale": 1.0}):
        before = study.logits(ids)
        with study.hooks({("post", 1): step}):
            after = study.logits(ids)
    torch.testing.assert_close(
        (after - before)[0, 2].double(), torch.from_numpy(told.values).double(), rtol=1e-3, atol=1e-4
    )


def test_units_may_be_anything_made_of_an_activation() -> None:
    study, ids = study_of("llama"), random_ids(1, 60)[0]
    found = study.top_contexts(("resid_post", 0), 1, text=ids, limit=48, encode=lambda x: x[..., :2] * -1)
    _, cache = study.run_with_cache(ids[:48].view(2, 24), ("resid_post", 0))
    expected = -cache["resid_post", 0].flatten(0, 1)[:, :2].min(0).values
    np.testing.assert_allclose(found.values[:, 0], expected, rtol=1e-6)
    assert found.notes["tokens"] == 48 and found.axes[0].name == "unit"


def test_questions_without_an_answer_are_refused() -> None:
    study = study_of("gpt2")
    for call, error, message in (
        (lambda: study.top_contexts(("post", 0)), ConfigError, "was not trained with minigpt"),
        (lambda: study.top_contexts(("post", 0), text="A"), DataError, "has 1 tokens"),
        (lambda: study.top_contexts(("post", 0), text=[1, 99]), DataError, "expected 0 .. 60"),
        (lambda: study.top_contexts(("pattern", 0), text="ABC"), ConfigError, "start with batch, pos"),
        (lambda: study.top_contexts(("post", 0), 0, text="ABC"), ConfigError, "0 contexts; expected 1 or more"),
        (lambda: study.neuron_effect(2, 0), ConfigError, "expected 0 .. 1"),
        (lambda: study.neuron_effect(0, 128), ConfigError, "expected 0 .. 127"),
    ):
        with pytest.raises(error, match=message):
            call()
