"""Averaged weights: equal to torch's own average, what is validated and saved, and resumed to the bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import minigpt
from minigpt.checkpoint.checkpoint import read_training_state
from minigpt.checkpoint.saving import state_of
from minigpt.data.batches import validation_windows
from minigpt.data.prepare import prepare
from minigpt.errors import Interrupted
from minigpt.evaluation.loss import bytes_per_token, evaluate
from minigpt.training.launch import train
from minigpt.training.recipe.average import Average
from minigpt.training.run.agreement import Agreement
from minigpt.training.run.module import TrainingModule
from toys import random_model, tiny_config
from training_runs import assert_equal_to_the_bit, losses, run_and_read, saved_tensors, tiny_run

BUSY = {
    "optimizer__ema_decay": 0.8,
    "optimizer__name": "muon",
    "model__preset": "modern",
    "model__dropout": 0.2,
    "batch__micro_batch_size": 4,
    "eval__every": 2,
    "sample__every": 3,
    "sample__max_new_tokens": 4,
    "checkpoint__every": 100,
}


def torch_average(decay: float):
    """torch.optim.swa_utils' average with our decays; its first update copies what the average begins with."""

    def blend(averaged: torch.Tensor, current: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        n = int(updates)
        part = min(decay, (1 + n) / (10 + n))
        return part * averaged + (1 - part) * current

    return blend


def test_the_average_is_that_of_torch() -> None:
    model = random_model(tiny_config("modern"))
    average, theirs = Average(model, 0.6), AveragedModel(model, avg_fn=torch_average(0.6))
    theirs.update_parameters(model)
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 21):  # the decay reaches 0.6 at the thirteenth
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        average.update()
        theirs.update_parameters(model)
        assert average.updates == update
        for name, parameter in theirs.module.named_parameters():
            torch.testing.assert_close(average.tensors[name], parameter, rtol=1e-6, atol=1e-6)


def test_swapping_puts_back_every_bit_whatever_happens() -> None:
    model = random_model(tiny_config("gpt2"))
    average = Average(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    average.update()
    raw = {name: tensor.clone() for name, tensor in state_of(model).items()}
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(KeyboardInterrupt), average.swapped():
        assert_equal_to_the_bit(state_of(model), averaged)
        assert_equal_to_the_bit(average.tensors, raw)
        raise KeyboardInterrupt
    assert_equal_to_the_bit(state_of(model), raw)
    assert_equal_to_the_bit(average.tensors, averaged)


def test_averaged_weights_are_what_is_validated_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    real = TrainingModule.optimizer_step

    def watched(self: TrainingModule, *arguments: object, **options: object) -> None:
        if not seen:
            seen.append({name: tensor.clone() for name, tensor in state_of(self.model).items()})
        real(self, *arguments, **options)
        seen.append({name: tensor.clone() for name, tensor in state_of(self.model).items()})

    monkeypatch.setattr(TrainingModule, "optimizer_step", watched)
    config = tiny_run(tmp_path, **{**BUSY, "trainer__max_steps": 6})
    run, rows = run_and_read(config)
    expected = seen[0]
    for n, raw in enumerate(seen[1:], 1):
        expected = {name: torch_average(0.8)(expected[name], raw[name], n) for name in raw}
    loaded = minigpt.load(run / "checkpoints/step-00000006")
    for name, tensor in state_of(loaded.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, seen[-1][name])
    state = saved_tensors(run, 6)
    assert all(torch.equal(state[f"raw/{name}"], tensor) for name, tensor in seen[-1].items())
    assert read_training_state(loaded.path)["average_updates"] == 6

    windows = validation_windows(prepare(config.data, config.tokenizer).val, 16, 10**6)
    result = evaluate(loaded.model, windows, bytes_per_token(loaded.tokenizer.token_bytes(), 257))
    assert [row["val/loss"] for row in rows if "val/loss" in row][-1] == pytest.approx(result.loss, rel=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    return run_and_read(tiny_run(tmp_path_factory.mktemp("uninterrupted"), **BUSY))


@pytest.mark.parametrize("stop", [5, 6])  # validation and a sample are due at 6
def test_a_resumed_run_has_the_averages_of_the_run_that_was_never_stopped(
    stop: int, uninterrupted: tuple[Path, list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, whole_rows = uninterrupted
    real = Agreement.on_step_end

    def stopped(self: Agreement, trainer, module, step: int) -> None:
        if step == stop:
            self.received = signal.SIGTERM
        real(self, trainer, module, step)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Agreement, "on_step_end", stopped)
        train(tiny_run(tmp_path, "parts", **BUSY))
    parts, parts_rows = run_and_read(tiny_run(tmp_path, "parts", **BUSY))
    assert losses(parts_rows) == losses(whole_rows)
    values = [[row["val/loss"] for row in rows if "val/loss" in row] for rows in (whole_rows, parts_rows)]
    assert values[0] == values[1]
    assert_equal_to_the_bit(saved_tensors(parts, 8), saved_tensors(whole, 8))
    for path in (whole / "samples").iterdir():
        assert (parts / "samples" / path.name).read_text() == path.read_text()


def test_averaging_may_begin_and_end_at_a_resume(tmp_path: Path) -> None:
    """The raw weights are those of a run that never averaged, whatever was switched on in between."""
    same = {"optimizer__schedule": "constant", "checkpoint__every": 100}
    run_and_read(tiny_run(tmp_path, "never", trainer__max_steps=6, **same))
    run_and_read(tiny_run(tmp_path, trainer__max_steps=2, **same))
    run, _ = run_and_read(tiny_run(tmp_path, trainer__max_steps=4, optimizer__ema_decay=0.5, **same))
    assert read_training_state(run / "checkpoints/step-00000004")["average_updates"] == 2
    run_and_read(tiny_run(tmp_path, trainer__max_steps=6, **same))
    assert_equal_to_the_bit(saved_tensors(run, 6), saved_tensors(tmp_path / "runs/never", 6))
