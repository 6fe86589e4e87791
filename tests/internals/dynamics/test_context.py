"""What is measured of a model at one moment: against hand-worked cases, planted patterns and a second way."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.errors import ConfigError
from minigpt.internals.dynamics import context, snapshot
from minigpt.internals.dynamics.context import held_out_windows, in_context_score, loss_by_position, score_of
from minigpt.internals.dynamics.snapshot import attention_entropy, in_doublings, numbers, repeats
from minigpt.internals.study import Study
from toys import PRESETS, random_ids, random_model, tiny_config


def study_of(preset: str) -> Study:
    return Study.of(random_model(tiny_config(preset)))


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_by_position_is_that_of_the_plain_model(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "TOKENS_AT_ONCE", 48)  # two rows per forward: a part of one is left over
    study, ids = study_of(preset), random_ids(5, 24)
    with torch.no_grad():
        logits = study.model(ids)
    found = loss_by_position(study, ids)
    assert found.axes[0].labels[0] == "1" and found.axes[0].labels[-1] == "23"
    for position in (1, 7, 23):
        expected = F.cross_entropy(logits[:, position - 1], ids[:, position])
        assert found[str(position)] == pytest.approx(float(expected), rel=1e-4)


def test_the_in_context_score_is_late_minus_early() -> None:
    losses = torch.arange(1.0, 101.0).expand(3, -1)  # the loss of position p is p
    score = score_of(losses)
    assert (score["early"], score["late"], score["score"]) == (10, 90, 80)  # means of 5 .. 15 and of 85 .. 95
    assert score.notes == {"early": "5-15", "late": "85-95"}
    assert score_of(torch.tensor([[3.0]]))["score"] == 0  # two tokens have one loss
    study, ids = study_of("llama"), random_ids(2, 21)
    by_position = loss_by_position(study, ids).values
    assert in_context_score(study, ids)["early"] == pytest.approx(by_position[0:3].mean(), rel=1e-5)


def test_loss_in_doublings_of_the_context() -> None:
    found = in_doublings(torch.arange(1.0, 11.0)[None])
    assert found == {"1": 1, "2-3": 2.5, "4-7": 5.5, "8-10": 9}


def test_entropy_is_0_on_one_token_and_1_evenly_over_all() -> None:
    even = torch.ones(8, 8).tril()
    even = even / even.sum(-1, keepdim=True)
    once = torch.eye(8)
    found = attention_entropy(torch.stack((even, once))[None])
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    halves = torch.zeros(1, 1, 4, 4)
    halves[..., 0, 0] = 1
    halves[..., 1:, :2] = 0.5
    expected = (1 + math.log(2) / math.log(3) + math.log(2) / math.log(4)) / 3  # queries that see 2, 3 and 4 tokens
    assert attention_entropy(halves).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_head_scores_are_the_attention_in_repeated_random_blocks(preset: str) -> None:
    study, ids = study_of(preset), random_ids(3, 20)
    figures, text = snapshot.snapshot(study, ids), repeats(ids)
    assert text.shape == (8, 20) and torch.equal(text[:, :10], text[:, 10:])
    assert all(len(row.unique()) == 10 for row in text) and set(text.unique().tolist()) <= set(ids.unique().tolist())
    _, cache = study.run_with_cache(text, "pattern")
    for layer, head in ((0, 2), (1, 3)):
        pattern = cache["pattern", layer][:, head]
        after_the_same = torch.stack([pattern[:, i, i - 10 + 1] for i in range(10, 20)]).mean()
        before = torch.stack([pattern[:, i, i - 1] for i in range(1, 20)]).mean()
        assert figures["induction"][f"L{layer}H{head}"] == pytest.approx(float(after_the_same), rel=1e-4)
        assert figures["previous"][f"L{layer}H{head}"] == pytest.approx(float(before), rel=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_ablation_is_the_loss_of_a_model_whose_head_writes_nothing(preset: str) -> None:
    study, ids = study_of(preset), random_ids(2, 24)
    model = copy.deepcopy(study.model)
    with torch.no_grad():
        model.trunk.blocks[1].attn.proj.weight[:, 16:24] = 0  # what the third of four heads of 8 channels writes with

        def loss(of: torch.nn.Module) -> float:
            return float(F.cross_entropy(of(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

        expected = loss(model) - loss(study.model)
    assert snapshot.snapshot(study, ids)["ablation"]["L1H2"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_are_those_of_the_stream_and_of_the_parameters(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "LOGITS_AT_ONCE", 48 * 61)
    study, ids = study_of(preset), random_ids(5, 24)
    figures = snapshot.snapshot(study, ids)
    _, cache = study.run_with_cache(ids)
    assert figures["stream"]["embed"] == pytest.approx(float(cache["resid_pre", 0].square().mean().sqrt()), rel=1e-5)
    assert figures["stream"]["1"] == pytest.approx(float(cache["resid_post", 1].square().mean().sqrt()), rel=1e-5)
    state = study.model.state_dict()
    block = torch.cat([tensor.flatten() for name, tensor in state.items() if name.startswith("trunk.blocks.1.")])
    assert figures["weights"]["1"] == pytest.approx(float(block.norm()), rel=1e-5)
    assert figures["weights"]["embed"] == pytest.approx(float(state["trunk.embed.weight"].norm()), rel=1e-5)
    assert ("unembed" in figures["weights"].axes[0].labels) == (preset != "gpt2")  # a tied one is the embedding


def test_a_snapshot_as_a_row_has_one_number_a_label() -> None:
    row = numbers(snapshot.snapshot(study_of("llama"), random_ids(2, 24)))
    assert all(isinstance(value, float) and math.isfinite(value) for value in row.values())
    kinds = [key.split("/")[1] for key in row]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **dict.fromkeys(("previous", "induction", "entropy", "ablation"), 8),
        **{"loss_by_position": 5, "in_context": 1, "stream": 3, "weights": 5},
    }
    assert "internals/induction/L1H3" in row and "internals/in_context/score" in row


def test_windows_are_spread_evenly_over_the_held_out_tokens() -> None:
    class Stream:
        def __init__(self, length: int) -> None:
            self.tokens = np.arange(length)

        def __len__(self) -> int:
            return len(self.tokens)

        def read(self, starts: np.ndarray, length: int) -> np.ndarray:
            return np.stack([self.tokens[start : start + length] for start in starts])

    corpus = SimpleNamespace(val=Stream(100), train=Stream(1000))
    assert held_out_windows(corpus, 10, 30)[:, 0].tolist() == [0, 45, 90]  # type: ignore[arg-type]
    assert held_out_windows(corpus, 10, 10_000).shape == (10, 10)  # type: ignore[arg-type]
    assert held_out_windows(corpus, 60, 120)[:, 0].tolist() == [0]  # type: ignore[arg-type]
    assert held_out_windows(corpus, 200, 400)[:, 0].tolist() == [0, 800]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no run and thus no corpus"):
        loss_by_position(study_of("gpt2"))
