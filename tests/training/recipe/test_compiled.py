"""What torch's compiler makes of our own backward passes is what they say: on every version of torch that is supported.

`tests/versions.py` runs this file, among others, with each of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import minigpt
from minigpt.training.recipe import loss
from minigpt.training.recipe.loss import next_token_loss, plain_loss
from minigpt.training.recipe.strategy import compiler_works
from toys import PRESETS, random_ids, random_model, tiny_config


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = torch.tensor([3, 0, 10, 7, 7])
ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "ScaledToUnit": lambda: (numbers(3, 8).requires_grad_(), 1e-5),
    "SquaredReLU": lambda: (numbers(3, 8).requires_grad_(),),
    "Rotated": lambda: (numbers(2, 5, 8).requires_grad_(), numbers(5, 8, seed=1), numbers(5, 8, seed=2)),
    "_ChunkedNats": lambda: (
        numbers(5, 8).requires_grad_(),
        numbers(11, 8, seed=1).requires_grad_(),
        TARGETS,
        2,
        3.0,
        torch.float64,
    ),
    "JumpReLU": lambda: (numbers(4, 8).requires_grad_(), numbers(8, seed=1).abs().requires_grad_(), 0.7),
    "Fires": lambda: (numbers(4, 8).requires_grad_(), numbers(8, seed=1).abs().requires_grad_(), 0.7),
}


def own_functions() -> dict[str, type]:
    """Every autograd function of the package."""
    for module in pkgutil.walk_packages(minigpt.__path__, "minigpt."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    found = torch.autograd.Function.__subclasses__()
    return {each.__name__: each for each in found if each.__module__.startswith("minigpt.")}


def test_every_function_has_a_case_here() -> None:
    assert own_functions().keys() == ARGUMENTS.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_function_of_ours_compiles_to_its_own_values_and_gradients(name: str) -> None:
    function = own_functions()[name]

    def compute(*arguments: Any) -> Tensor:
        return (function.apply(*arguments) * 1.5).sum()

    results = []
    torch._dynamo.reset()
    for form in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
        arguments = ARGUMENTS[name]()
        value = form(*arguments)
        value.backward()
        gradients = [a.grad for a in arguments if isinstance(a, Tensor) and a.requires_grad and a.grad is not None]
        assert any(gradient.any() for gradient in gradients)
        results.append([value.detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "preset", "chunked"),
    [
        *(("aot_eager", preset, chunked) for preset in PRESETS for chunked in (True, False)),
        ("inductor", "gpt2", True),
        ("inductor", "modern", False),
    ],
)
def test_a_compiled_loss_has_the_gradients_of_the_plain_one(
    preset: str, chunked: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and not compiler_works(torch.device("cpu")):
        pytest.skip("torch.compile finds no C++ compiler here")
    if chunked:
        monkeypatch.setattr(loss, "CPU_LOGITS", 20 * 61)
    model = random_model(tiny_config(preset, n_layer=1, logit_softcap=3.0)).train()
    ids, targets = random_ids(3, 24, seed=1), random_ids(3, 24, seed=2)
    torch._dynamo.reset()
    found = []
    for form in (plain_loss, torch.compile(next_token_loss, backend=backend, dynamic=False)):
        model.zero_grad()
        value = form(model, ids, targets)
        value.backward()
        found.append({"loss": value.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}})
    for name, expected in found[0].items():
        assert float((found[1][name] - expected).norm()) <= 1e-4 * float(expected.norm()), name
