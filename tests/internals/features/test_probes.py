"""Linear probes against other solvers, a case worked by hand, and a planted property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.errors import ConfigError, DataError
from minigpt.internals.features.probes import fit, logistic, ridge
from minigpt.internals.study import Study
from toys import random_ids, random_model, tiny_config


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_ridge_is_least_squares_with_the_penalty_as_further_rows(l2: float) -> None:
    x, y = numbers(40, 6) + 2, numbers(40, 3, seed=1)
    weight, bias = ridge(x, y, l2)
    # sum of squares + n l2 |w|^2 is the sum of squares of a system with 6 more rows; the bias is a column of its own
    padded = torch.cat((torch.cat((x, torch.ones(40, 1).double()), 1), torch.zeros(6, 7).double()))
    padded[40:, :6] = math.sqrt(40 * l2) * torch.eye(6)
    expected = torch.linalg.lstsq(padded, torch.cat((y, torch.zeros(6, 3).double()))).solution if l2 else None
    if expected is None:
        expected = torch.linalg.lstsq(padded[:40], y).solution
    torch.testing.assert_close(weight, expected[:6])
    torch.testing.assert_close(bias, expected[6])


def test_logistic_regression_of_one_bit_is_the_log_odds() -> None:
    # x = +1: label 1 in 3 cases of 4; x = -1: in 1 of 4. The log-odds ln 3 and -ln 3 lie on a line: slope ln 3, bias 0.
    x = torch.tensor([[1.0]] * 4 + [[-1.0]] * 4, dtype=torch.float64)
    weight, bias = logistic(x, torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]), 2, 0.0)
    assert float(weight[0, 1] - weight[0, 0]) == pytest.approx(math.log(3), abs=1e-6)
    assert float(bias[1] - bias[0]) == pytest.approx(0, abs=1e-6)


def test_logistic_regression_is_at_the_bottom_of_its_loss() -> None:
    x, labels = numbers(60, 5), torch.randint(3, (60,), generator=torch.Generator().manual_seed(3))
    weight, bias = logistic(x, labels, 3, 0.1)
    chance = F.softmax(x @ weight + bias, -1) - F.one_hot(labels, 3)  # the gradient of cross-entropy by the logits
    torch.testing.assert_close(x.T @ chance / 60 + 0.1 * weight, torch.zeros(5, 3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(chance.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)


def test_a_probe_does_not_mind_how_an_activation_is_scaled_and_shifted() -> None:
    x, labels = numbers(50, 4), torch.randint(2, (50,), generator=torch.Generator().manual_seed(1))
    plain, moved = fit(x, labels, ["a", "b"], 0.1), fit(x * 100 + 7, labels, ["a", "b"], 0.1)
    torch.testing.assert_close(moved.weight * 100, plain.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(moved.read(x * 100 + 7), plain.read(x))


def test_what_the_last_token_is_can_be_read_off_its_embedding_and_what_no_token_says_cannot() -> None:
    study, ids = Study.of(random_model(tiny_config("gpt2"))), random_ids(200, 5)
    ids[:, -1] %= 4
    texts = ids.tolist()
    labels = ["odd" if row[-1] % 2 else "even" for row in texts]
    told = study.probe(texts, labels, "embed", seed=2)
    assert told["hook_embed", "held-out"] == 1.0
    assert 0.25 < told["hook_embed", "shuffled labels"] < 0.75
    assert (told.notes["fitted"], told.notes["held out"]) == (150, 50)
    made = told.probes["hook_embed"]
    assert made.classes == ["even", "odd"]
    _, cache = study.run_with_cache([[1], [2], [3]], "embed")
    assert made.read(cache["embed"][:, 0]).tolist() == [1, 0, 1]
    coins = np.random.default_rng(0).integers(2, size=200).astype(str).tolist()
    assert study.probe(texts, coins, "embed")["hook_embed", "held-out"] < 0.75


def test_a_number_that_is_linear_in_the_mean_embedding_is_read_exactly() -> None:
    study = Study.of(random_model(tiny_config("llama")))
    texts = [row[: 2 + i % 5] for i, row in enumerate(random_ids(80, 7).tolist())]
    direction = numbers(32, seed=5).float()
    embedded = study.model.trunk.embed.weight.detach()
    targets = [float(embedded[row].mean(0) @ direction) for row in texts]
    told = study.probe(texts, targets, ["embed", "resid_post"], position=None, l2=1e-6)
    assert told.axes[0].labels == ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert told["hook_embed", "held-out"] > 0.999
    assert told["hook_embed", "shuffled labels"] < 0.3
    assert told.unit == "R^2"


def test_labels_that_cannot_be_learned_from_are_refused() -> None:
    study, texts = Study.of(random_model(tiny_config("gpt2"))), random_ids(8, 3).tolist()
    for labels, options, error, message in (
        (["a"] * 7, {}, DataError, "7 labels for 8 texts"),
        (["a"] * 8, {}, DataError, "with 1 different values"),
        (["a", "b"] * 4, {"held_out": 1.0}, ConfigError, "not between 0 and 1"),
        (["a", "b"] * 4, {"at": "pattern"}, ConfigError, "expected one whose axes start with batch, pos"),
    ):
        with pytest.raises(error, match=message):
            study.probe(texts, labels, **options)  # type: ignore[arg-type]
