"""Path patching, against activations computed by hand from the corrupted run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError, DataError
from minigpt.internals.causal import paths
from minigpt.internals.causal.effect import logit_difference, loss
from minigpt.internals.causal.paths import every_receiver, every_sender, patch_paths
from minigpt.internals.study import Study
from minigpt.model.gpt import GPT
from planted import INDUCTION, PREVIOUS, induction_model
from toys import PRESETS, random_ids, random_model, tiny_config

ANSWER = logit_difference(3, 5)
CLEAN, CORRUPTED = random_ids(2, 6), random_ids(2, 6, seed=1)


def study_of(preset: str, **changes: object) -> Study:
    return Study.of(random_model(tiny_config(preset, **changes)).double())


def answer(study: Study, logits: torch.Tensor) -> float:
    return float((logits[:, -1, 3] - logits[:, -1, 5]).mean())


@pytest.mark.parametrize("preset", PRESETS)
def test_all_paths_together_give_the_clean_text(preset: str) -> None:
    study = study_of(preset)
    everything, everywhere = tuple(every_sender(study)), tuple(every_receiver(study))
    for metric in (ANSWER, loss()):
        found = patch_paths(study, CLEAN, CORRUPTED, metric, [everything], [everywhere])
        np.testing.assert_allclose(found.values, found.notes["clean"] - found.notes["corrupted"])
    # Without the way to the logits, every part does as in the clean text, and the stream lacks the clean embeddings.
    found = patch_paths(study, CLEAN, CORRUPTED, ANSWER, [everything], [everywhere[:-1]])
    _, clean = study.run_with_cache(CLEAN, ("resid_pre", 0))
    _, corrupted = study.run_with_cache(CORRUPTED, ("resid_pre", 0))
    less = corrupted["resid_pre", 0] - clean["resid_pre", 0]
    with study.hooks({("resid_post", -1): lambda x, site: x + less}):
        expected = answer(study, study.logits(CLEAN))
    np.testing.assert_allclose(found.values, expected - found.notes["corrupted"])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_direct_path_to_the_logits_adds_what_the_sender_writes_to_the_last_stream(preset: str) -> None:
    study = study_of(preset)
    names = ["result", "mlp_out", ("resid_pre", 0), ("resid_post", -1)]
    _, clean = study.run_with_cache(CLEAN, names)
    _, corrupted = study.run_with_cache(CORRUPTED, names)
    found = patch_paths(study, CLEAN, CORRUPTED, ANSWER)
    assert found.axes[0].labels == every_sender(study)
    senders = {
        "embed": lambda cache: cache["resid_pre", 0],
        "L0H2": lambda cache: cache["result", 0][:, :, 2],
        "L1 mlp": lambda cache: cache["mlp_out", 1],
    }
    for name, written in senders.items():
        stream = corrupted["resid_post", -1] + written(clean) - written(corrupted)
        logits = study.model.unembed(study.model.trunk.norm(stream))
        assert found[name, "logits"] == pytest.approx(answer(study, logits.detach()) - found.notes["corrupted"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_path_into_a_head_or_mlp_changes_what_it_alone_reads(preset: str) -> None:
    study = study_of(preset)
    model, counts = study.model, (4, study.config.n_kv_head, study.config.n_kv_head)
    _, clean = study.run_with_cache(CLEAN, "result")
    _, corrupted = study.run_with_cache(CORRUPTED, ["result", "resid_pre", "resid_mid"])
    sent = (clean["result", 0] - corrupted["result", 0])[:, :, 1]
    block = model.trunk.blocks[1]
    with torch.no_grad():
        heads = block.attn.heads(block.norm1(corrupted["resid_pre", 1] + sent)).transpose(1, 2).split(counts, 2)
        mlp_out = block.mlp(block.norm2(corrupted["resid_mid", 1] + sent))
    receivers = [f"L1H1.{letter}" for letter in "qkv"]
    found = patch_paths(study, CLEAN, CORRUPTED, ANSWER, ["L0H1", "L1H0"], [*receivers, "L1 mlp", tuple(receivers)])

    def head_1(read: torch.Tensor) -> Any:
        def edit(activation: torch.Tensor, site: object) -> None:
            activation[:, :, 1] = read[:, :, 1]

        return edit

    each = {(letter, 1): head_1(made) for letter, made in zip("qkv", heads, strict=True)}
    cases = [*({name: edit} for name, edit in each.items()), {("mlp_out", 1): mlp_out}, each]
    for column, edits in enumerate(cases):
        with study.hooks(edits):
            expected = answer(study, study.logits(CORRUPTED)) - found.notes["corrupted"]
        assert found.values[0, column] == pytest.approx(expected) and abs(expected) > 1e-4
    # A head of the same block writes too late for its neighbours, and in time for the MLP.
    assert np.isnan(found.values[1, [0, 1, 2, 4]]).all() and not np.isnan(found.values[1, 3])


def linear_out(model: GPT) -> GPT:
    """The same model with a final norm that divides by one number, to ten digits."""
    model.trunk.norm.eps = 1e14
    with torch.no_grad():
        model.trunk.norm.weight.fill_(1e7)
    return model


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_in_one_layer_of_attention_direct_and_indirect_effect_make_the_total(preset: str) -> None:
    model = linear_out(random_model(tiny_config(preset, n_layer=1)).double())
    torch.nn.init.zeros_(model.trunk.blocks[0].mlp.down.weight)
    study = Study.of(model)
    inputs = tuple(every_receiver(study)[:-2])
    found = patch_paths(study, CLEAN, CORRUPTED, ANSWER, ["embed"], ["logits", inputs])
    total = found.notes["clean"] - found.notes["corrupted"]
    direct, indirect = found.values[0]
    assert direct + indirect == pytest.approx(total, rel=1e-6)
    assert min(abs(direct), abs(indirect)) > 1e-3 * abs(total)


def test_the_planted_heads_speak_through_keys() -> None:
    study = Study.of(induction_model().double())
    clean, corrupted = [3, 1, 4, 9, 3, 1, 4], [3, 1, 7, 9, 3, 1, 4]  # what stood before the 9
    sender, receiver = (f"L{layer}H{head}" for layer, head in (PREVIOUS, INDUCTION))
    inputs = [f"{receiver}.{letter}" for letter in "qkv"]
    found = patch_paths(study, clean, corrupted, logit_difference(9), [sender, "L0H0"], inputs)
    whole = found.notes["clean"] - found.notes["corrupted"]
    assert found[sender, f"{receiver}.k"] == pytest.approx(whole, rel=0.05) and whole > 1
    rest = np.abs(found.values) > 0.01 * whole
    assert rest.sum() == 1


def test_batches_of_senders_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of("modern")
    receivers = ["logits", "L1H0.q", ("L1 mlp", "L1H1.v")]
    large = patch_paths(study, CLEAN, CORRUPTED, ANSWER, receivers=receivers)
    monkeypatch.setattr(paths, "TOKENS", 1)
    small = patch_paths(study, CLEAN, CORRUPTED, ANSWER, receivers=receivers)
    np.testing.assert_allclose(large.values, small.values)
    assert large.axes[1].labels == ["logits", "L1H0.q", "L1 mlp + L1H1.v"]


@pytest.mark.parametrize("name", ["L2H0", "L0H4", "logits", "L0", "L0H1.q"])
def test_a_sender_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"sender '{name}'"):
        patch_paths(study_of("llama"), CLEAN, CORRUPTED, ANSWER, [name])


@pytest.mark.parametrize("name", ["L2 mlp", "L0H2.k", "L0H1", "embed", "L0 attn"])
def test_a_receiver_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"receiver '{name}'"):
        patch_paths(study_of("llama"), CLEAN, CORRUPTED, ANSWER, ["embed"], [name])
    with pytest.raises(DataError, match="expected equal numbers"):
        patch_paths(study_of("llama"), CLEAN, CORRUPTED[:, :3], ANSWER)
