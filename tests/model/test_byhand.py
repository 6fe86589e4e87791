"""Backward passes written by hand: against finite differences, and against PyTorch's own derivative of the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from minigpt.model import byhand
from minigpt.model.positions import Rotary
from toys import random_model, tiny_config


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_gradients_equal_finite_differences() -> None:
    rotary = Rotary(tiny_config("modern", head_dim=4, block_size=5, rope_theta=10.0)).double()
    assert gradcheck(lambda x: byhand.ScaledToUnit.apply(x, 1e-5), numbers(2, 3, 4))
    assert gradcheck(byhand.SquaredReLU.apply, numbers(2, 3, 4))
    assert gradcheck(lambda x: byhand.Rotated.apply(x, rotary.cos, rotary.sin), numbers(2, 2, 5, 4))


@pytest.mark.parametrize("overrides", [{}, {"norm_weight": True}, {"preset": "llama"}])
def test_training_takes_them_and_computes_the_same(overrides: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(**{"preset": "modern", **overrides})).double()
    ids = torch.arange(24).reshape(3, 8) % model.vocab_size

    def loss_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor], str]:
        model.zero_grad()
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()], names_in(loss.grad_fn)

    loss, gradients, nodes = loss_and_gradients()
    assert "ScaledToUnit" in nodes and "Rotated" in nodes
    monkeypatch.setattr(byhand, "suits", lambda x, half=False: False)
    expected_loss, expected, nodes = loss_and_gradients()
    assert "ScaledToUnit" not in nodes
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def names_in(node: object) -> str:
    """The names of every node of an autograd graph."""
    seen, waiting = {}, [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = type(node).__name__
            waiting += [following for following, _ in node.next_functions]
    return " ".join(seen.values())


def test_autocast_on_a_cpu_leaves_attention_in_float32() -> None:
    model = random_model(tiny_config("modern"))
    ids = torch.arange(24).reshape(3, 8) % model.vocab_size
    seen = []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((q.dtype, k.dtype, v.dtype, torch.is_autocast_enabled("cpu")))
        return real(q, k, v, **options)

    real = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "scaled_dot_product_attention", watched)
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert seen == [(torch.float32, torch.float32, torch.float32, False)] * 2
    half = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for got, parameter in zip(half, model.parameters(), strict=True):
        assert (got - parameter.grad).norm() < 0.05 * parameter.grad.norm()
