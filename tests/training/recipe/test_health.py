"""A run that cannot learn does not look healthy: it stops, says why and by which parameters, and exits with 7."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minigpt.errors import NotLearning
from minigpt.model.gpt import GPT
from minigpt.training.launch import train
from minigpt.training.recipe import loss
from minigpt.training.recipe.health import not_zero
from minigpt.training.recipe.loss import Terms, next_token_loss
from minigpt.training.run import fit, module, rehearsal
from minigpt.training.run.metrics import read_metrics
from training_runs import forked, losses, run_and_read, tiny_run


def without_gradient(value: Tensor) -> Tensor:
    """The same number; its gradients exist and are zero."""
    return value.detach() + 0 * value


def after_calls(calls: int, then: Callable[[Tensor], Tensor]) -> Callable[[GPT, Tensor, Tensor], Tensor]:
    """The loss; `then` is done to it after so many calls."""
    seen = []

    def compute(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        seen.append(1)
        value = next_token_loss(model, ids, targets)
        return then(value) if len(seen) > calls else value

    return compute


def refused(config: Any) -> str:
    with pytest.raises(NotLearning) as caught:
        train(config)
    assert caught.value.exit_code == 7
    return str(caught.value)


def test_a_gradient_of_zero_stops_a_run_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "next_token_loss", after_calls(0, without_gradient))
    assert "the gradient of every parameter is exactly zero, though the loss is 5." in refused(tiny_run(tmp_path))
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_a_gradient_that_becomes_zero_stops_a_run_after_five_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "next_token_loss", after_calls(1 + 2, without_gradient))  # one is rehearsed
    said = refused(tiny_run(tmp_path, trainer__max_steps=20))
    assert said.startswith("step 7: the gradient of every parameter was exactly zero 5 steps in a row")
    assert [row["grad_norm"] > 0 for row in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [True] * 2 + [
        False
    ] * 4


def test_a_loss_of_zero_has_nothing_left_to_teach(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a" * 2000)
    _, rows = run_and_read(
        tiny_run(tmp_path, data__source=str(text), tokenizer__kind="char", model__vocab_size=1)
    )  # a vocabulary of one token
    assert losses(rows) == [0.0] * 8


class Extra(GPT):
    """A GPT with a parameter more, which `used` tells how the loss depends on."""

    used: Callable[[Tensor], Tensor]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.trunk.surplus = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("used", "message"),
    [
        (lambda surplus: torch.zeros(()), "trunk.surplus: the loss does not depend on these parameters"),
        (
            lambda surplus: surplus.relu().sum() * 0,
            "trunk.surplus: the gradient was exactly zero in each of the first 5",
        ),
    ],
)
def test_a_parameter_that_never_learns_is_named(
    used: Callable[[Tensor], Tensor], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "GPT", Extra)
    monkeypatch.setattr(
        loss, "next_token_loss", lambda model, *batch: next_token_loss(model, *batch) + used(model.trunk.surplus)
    )
    assert message in refused(tiny_run(tmp_path))


def test_what_is_frozen_needs_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(GPT):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.trunk.position.weight.requires_grad_(False)

    monkeypatch.setattr(fit, "GPT", Frozen)
    train(tiny_run(tmp_path, trainer__max_steps=6))


def as_terms(scalar: Callable[[GPT, Tensor, Tensor], Tensor]) -> Callable[[GPT, Tensor, Tensor], Terms]:
    """A loss of one number as an objective without added losses."""

    def compute(model: GPT, ids: Tensor, targets: Tensor) -> Terms:
        value = scalar(model, ids, targets)
        return Terms(value, value.detach()[None])

    return compute


def compiled_by(then: Callable[[Tensor], Tensor]) -> Callable[[Any], Callable[[GPT, Tensor, Tensor], Terms]]:
    """torch.compile with a compiler whose code does `then` to what it computes."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *arguments: [then(output) for output in graph(*arguments)]

    torch._dynamo.reset()
    return lambda objective: as_terms(torch.compile(next_token_loss, backend=backend, dynamic=False))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "no gradient": without_gradient,
    "half the gradient": lambda value: (value + value.detach()) / 2,
    "another loss": lambda value: value - value.detach() * 0.1,
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_compiler_that_is_wrong_is_found_before_the_first_step(
    wrong: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "another loss" and precision == "bf16-mixed":
        pytest.skip("a tenth is within what bfloat16 may be off")
    monkeypatch.setattr(module, "compiled", compiled_by(WRONG[wrong]))
    said = refused(tiny_run(tmp_path, trainer__compile=True, trainer__precision=precision))
    assert "it differs from the eager step on the same batch" in said
    assert "give --trainer.compile false" in said
    assert ("the loss (" if wrong == "another loss" else "trunk.embed.weight (norm ") in said
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_with_dropout_a_compiler_that_gives_no_gradient_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compiled", compiled_by(without_gradient))
    assert "trunk.embed.weight (norm 0, eager " in refused(
        tiny_run(tmp_path, trainer__compile=True, model__dropout=0.2)
    )


@pytest.mark.parametrize(
    ("preset", "precision", "dropout"),
    [("gpt2", "32-true", 0.0), ("llama", "bf16-mixed", 0.0), ("modern", "bf16-mixed", 0.2)],
)
def test_a_compiler_that_is_right_passes(
    preset: str, precision: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(module, "compiled", lambda _: as_terms(torch.compile(next_token_loss, backend="aot_eager")))
    changes = {
        "trainer__compile": True,
        "trainer__precision": precision,
        "model__dropout": dropout,
        "model__n_layer": 1,
    }
    _, rows = run_and_read(tiny_run(tmp_path, model__preset=preset, trainer__max_steps=2, **changes))
    assert len(losses(rows)) == 2
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)


def test_a_gradient_that_is_not_finite_is_no_fault_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The step is skipped, as it is uncompiled."""
    calls = []

    def compute(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        value = next_token_loss(model, ids, targets)
        return value + (value - value.detach()) * (float("inf") if len(calls) <= 4 else 1.0)

    monkeypatch.setattr(module, "compiled", lambda _: as_terms(compute))
    _, rows = run_and_read(tiny_run(tmp_path, trainer__compile=True, batch__micro_batch_size=2, trainer__max_steps=2))
    assert len(losses(rows)) == 2
    assert "differs from the eager step" not in capsys.readouterr().err


def test_a_comparison_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def too_much(model: GPT, *arguments: object) -> None:
        model.zero_grad()  # on the way
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal, "check_compiled", too_much)
    monkeypatch.setattr(module, "compiled", lambda _: as_terms(next_token_loss))
    run_and_read(tiny_run(tmp_path, trainer__compile=True, trainer__max_steps=1))
    assert "with the uncompiled one" in capsys.readouterr().err


def test_a_gradient_too_small_to_square_is_not_zero() -> None:
    tiny = torch.full((3,), 1e-30)
    assert not tiny.square().any()
    assert not_zero([tiny, torch.zeros(3), None]).tolist() == [True, False, False]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_hear_of_it_alike(tmp_path: Path) -> None:
    def broken(rank: int) -> None:
        loss.next_token_loss = after_calls(0, without_gradient)  # type: ignore[assignment]

    assert forked(tiny_run(tmp_path, trainer__devices=2), broken) == {0: 7, 1: 7}
