"""OV and QK circuits and composition, against the matrices multiplied out and against the running model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.internals.attribution.weights import (
    TokenMatrix,
    composition,
    copying_from_weights,
    ov_circuit,
    qk_circuit,
    read_out,
)
from minigpt.internals.causal.effect import logit_difference
from minigpt.internals.causal.heads import head_scores, heads
from minigpt.internals.study import Study
from minigpt.model.gpt import GPT
from planted import INDUCTION, PREVIOUS, induction_model
from toys import PRESETS, random_ids, random_model, tiny_config


def alone(preset: str) -> GPT:
    """A random model in which nothing but the token's embedding enters the stream."""
    model = random_model(tiny_config(preset, bigram_rows=0, trigram_rows=0)).double()
    if model.trunk.position is not None:
        torch.nn.init.zeros_(model.trunk.position.weight)
    return model


@pytest.mark.parametrize("preset", PRESETS)
def test_qk_entries_are_the_scores_of_the_first_block(preset: str) -> None:
    study = Study.of(alone(preset))
    for head in range(4):
        rows = [[7, 50, 3, 11], [9, 9, 60, 2]]
        _, cache = study.run_with_cache(rows, ("attn_scores", 0))
        scores = cache["attn_scores", 0][:, head]
        for distance in (0, 1, 3):
            circuit = qk_circuit(study, 0, head, distance)
            for row, ids in enumerate(rows):
                entry = circuit.entries(torch.tensor([ids[3]]), torch.tensor([ids[3 - distance]]))
                torch.testing.assert_close(entry[0, 0], scores[row, 3, 3 - distance])
        assert circuit.notes == ({"left out": "learned positions"} if preset == "gpt2" else {})


@pytest.mark.parametrize("preset", PRESETS)
def test_ov_entries_are_what_a_head_of_the_first_block_adds_to_the_logits(preset: str) -> None:
    model = alone(preset)
    study, every = Study.of(model), torch.arange(61)
    attn, norm = model.trunk.blocks[0].attn, model.trunk.norm
    constant = 0.0  # what the biases add, whatever is looked at
    if preset == "gpt2":
        constant = (attn.qkv.bias + attn.qkv.weight @ model.trunk.blocks[0].norm1.bias)[-32:].view(4, 8)
    _, cache = study.run_with_cache(every[:, None], ("z", 0))
    z = cache["z", 0][:, 0] - constant  # (V, H, D): each token looks at itself
    for head in (0, 3):
        written = z[:, head] @ attn.proj.weight.T[head * 8 : head * 8 + 8]  # (V, C)
        centred = written - written.mean(-1, keepdim=True) if preset == "gpt2" else written
        logits = model.unembed.project(centred if norm.weight is None else centred * norm.weight)
        torch.testing.assert_close(ov_circuit(study, 0, head).entries(every, every), logits)


@pytest.mark.parametrize("preset", PRESETS)
def test_spectrum_and_copying_score_are_those_of_the_matrix_multiplied_out(preset: str) -> None:
    study, every = Study.of(random_model(tiny_config(preset)).double()), torch.arange(61)
    scores = copying_from_weights(study)
    for head in (0, 3):
        circuit = ov_circuit(study, 1, head)
        whole = circuit.entries(every, every).numpy()
        np.testing.assert_allclose(circuit.spectrum().values, np.linalg.svd(whole)[1][:8])
        values = np.linalg.eigvals(whole)
        expected = values.sum().real / np.abs(values).sum()
        assert circuit.copying() == pytest.approx(expected) == scores["1", f"H{head}"]
        u, singular, v = circuit.svd()
        np.testing.assert_allclose((u * singular) @ v.T, whole, atol=1e-9)
    assert "earlier layers" in scores.notes["left out"]


def test_directions_name_the_tokens_that_they_take_from_and_give_to() -> None:
    left, right = torch.zeros(4, 2), torch.zeros(4, 2)
    left[0, 0] = right[3, 0] = 3.0  # from a to d, strongly
    left[1, 1], right[2, 1] = -1.0, 2.0  # b lowers c
    circuit = TokenMatrix("by hand", left, right, list("abcd"))
    (first, takes, gives), (second, *_) = circuit.directions(2, 1)
    assert (takes, gives) == (["a"], ["d"]) and (first, second) == (pytest.approx(9.0), pytest.approx(2.0))
    assert "'a' 'd'" not in str(circuit) and "9" in str(circuit)


def test_the_planted_head_copies_and_matches_the_token_before() -> None:
    study = Study.of(induction_model())
    assert copying_from_weights(study)[str(INDUCTION[0]), f"H{INDUCTION[1]}"] == pytest.approx(1.0)
    earlier, later = (f"L{layer}H{head}" for layer, head in (PREVIOUS, INDUCTION))
    ((best, score), *_), others = composition(study, "K").top(1), [composition(study, kind) for kind in "QV"]
    assert best == (earlier, later) and score > 0.1
    assert all(result[earlier, later] < 0 for result in others)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_is_the_ratio_of_norms_of_the_matrices_multiplied_out(preset: str, kind: str) -> None:
    model = random_model(tiny_config(preset)).double()
    result = composition(Study.of(model), kind)  # type: ignore[arg-type]
    group = 4 // model.config.n_kv_head

    def matrices(layer: int, head: int) -> dict[str, torch.Tensor]:
        block = model.trunk.blocks[layer]
        parts = block.attn.qkv.weight.detach().view(-1, 8, 32)
        q, k, v = parts[head], parts[4 + head // group], parts[4 + model.config.n_kv_head + head // group]
        if model.config.norm == "layernorm":
            centre = torch.eye(32, dtype=torch.float64) - 1 / 32
        else:
            centre = torch.eye(32, dtype=torch.float64)
        gain = centre if block.norm1.weight is None else centre @ torch.diag(block.norm1.weight.detach())
        scale = torch.eye(8, dtype=torch.float64)
        if block.attn.q_norm is not None and block.attn.q_norm.weight is not None:
            scale = torch.diag(block.attn.q_norm.weight * block.attn.k_norm.weight).detach()
        qk = gain @ q.T @ scale @ k @ gain.T
        ov = gain @ v.T @ block.attn.proj.weight.detach()[:, head * 8 : head * 8 + 8].T
        return {"Q": qk, "K": qk.T, "V": ov}

    for first in range(4):
        for second in range(4):
            a, b = matrices(0, first)["V"], matrices(1, second)[kind]
            expected = (a @ b).norm() / (a.norm() * b.norm()) - 32**-0.5
            assert result[f"L0H{first}", f"L1H{second}"] == pytest.approx(float(expected))
    assert np.isnan(result.values[:, :4]).all() and np.isnan(result.values[4:]).all()


def test_chance_is_one_over_the_root_of_the_width_whatever_the_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator) @ torch.diag(torch.linspace(0, 5, 16))
    b = torch.diag(torch.tensor([4.0, 1, 0.5] + [0.0] * 13)) @ torch.randn(16, 16, generator=generator)
    rotations = [torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q for _ in range(2000)]
    ratios = torch.stack([(a @ turn @ b).norm() / (a.norm() * b.norm()) for turn in rotations])
    assert float(ratios.square().mean()) == pytest.approx(1 / 16, rel=0.05)


def test_what_no_model_has_is_refused() -> None:
    study = Study.of(random_model(tiny_config("llama")))
    with pytest.raises(ConfigError, match="L2H0: no such head"):
        ov_circuit(study, 2, 0)
    with pytest.raises(ConfigError, match="distance: 24"):
        qk_circuit(study, 0, 0, 24)
    with pytest.raises(ConfigError, match="expected Q, K or V"):
        composition(study, "O")  # type: ignore[arg-type]


def test_the_final_norm_is_folded_into_what_logits_read() -> None:
    model = random_model(tiny_config("gpt2")).double()
    out = read_out(model, torch.arange(61))
    stream = torch.randn(5, 32, dtype=torch.float64)
    scale = (stream - stream.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).add(1e-5).sqrt()
    expected = model.unembed.project(model.trunk.norm(stream) - model.trunk.norm.bias)
    torch.testing.assert_close(stream / scale @ out, expected)


def test_circuits_and_scores_of_a_half_precision_model_are_near_those_of_a_whole_one() -> None:
    whole, half = (Study.of(random_model(tiny_config("modern")).to(kind)) for kind in (torch.float32, torch.bfloat16))
    for circuit in (ov_circuit, qk_circuit):
        one, other = circuit(whole, 0, 1).spectrum().values, circuit(half, 0, 1).spectrum().values
        np.testing.assert_allclose(other, one, rtol=0.05)
    np.testing.assert_allclose(copying_from_weights(half).values, copying_from_weights(whole).values, atol=0.05)
    for kind, result in heads(half, causal=False).scores.items():
        np.testing.assert_allclose(result.values, head_scores(whole, kind).values, atol=0.05)


def test_a_device_without_double_precision_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    study, ids, other = Study.of(random_model(tiny_config("llama"))), random_ids(1, 6), random_ids(1, 6, seed=1)
    fetched, double = torch.Tensor.cpu, torch.Tensor.double

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        made = fetched(tensor).view(tensor.shape)
        made.on_cpu = True  # type: ignore[attr-defined]
        return made

    def only_there(tensor: torch.Tensor) -> torch.Tensor:
        assert hasattr(tensor, "on_cpu"), "double precision was asked for where the model is"
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", only_there)
    metric = logit_difference(3, 5)
    for at in ("resid_pre", "z", "k"):
        study.attribution_patch(ids, other, metric, at)
    study.patch_paths(ids, other, metric, ["embed"], ["logits", "L1H0.q"])
    study.rollout(ids)
    study.value_flow(ids)
    for kind in ("Q", "K", "V"):
        study.composition(kind)  # type: ignore[arg-type]
    study.components(ids)
    study.attribute_logit(ids, 3)
    study.saliency(ids, 3)
    study.ablate(ids)
