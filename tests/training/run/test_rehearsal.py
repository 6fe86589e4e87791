"""The step before the first: it finds what does not fit, and leaves no trace."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from minigpt.errors import MemoryExceeded
from minigpt.model.device import memory_errors
from minigpt.training.launch import train
from minigpt.training.recipe import loss as training_loss
from minigpt.training.run import rehearsal
from minigpt.training.run.rehearsal import Rehearsal, training_advice
from training_runs import losses, run_and_read, tiny_run


def test_a_run_is_the_same_with_and_without_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, which draws random numbers: generator, gradients and weights are as before."""
    seen = []

    def traced(self: Rehearsal, trainer, module) -> None:
        before = torch.get_rng_state(), [parameter.detach().clone() for parameter in module.parameters()]
        real(self, trainer, module)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before[1], strict=True))
        assert all(parameter.grad is None for parameter in module.parameters())
        assert module.step_losses is None
        seen.append(1)

    real = Rehearsal.on_train_start
    monkeypatch.setattr(Rehearsal, "on_train_start", traced)
    _, rehearsed = run_and_read(tiny_run(tmp_path, "rehearsed", model__dropout=0.3))
    assert seen
    monkeypatch.setattr(Rehearsal, "on_train_start", lambda *_: None)
    _, plain = run_and_read(tiny_run(tmp_path, "plain", model__dropout=0.3))
    assert losses(rehearsed) == losses(plain)


def test_memory_that_does_not_suffice_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(ids) > 2:
            raise MemoryError
        return real(model, ids, targets)

    real = training_loss.next_token_loss
    monkeypatch.setattr(training_loss, "next_token_loss", too_large)
    with pytest.raises(MemoryExceeded, match=r"with 8 rows .* give --batch\.micro_batch_size 4: 2 forward passes"):
        train(tiny_run(tmp_path))
    run = tmp_path / "runs/run"
    assert not (run / "metrics.jsonl").exists() and not list((run / "checkpoints").iterdir())
    with pytest.raises(MemoryExceeded, match=r"with 4 rows .* give --batch\.micro_batch_size 2: 4 forward passes"):
        train(tiny_run(tmp_path, batch__micro_batch_size=4))
    _, rows = run_and_read(tiny_run(tmp_path, batch__micro_batch_size=2))
    assert len(losses(rows)) == 8


def test_memory_that_does_not_suffice_to_validate_is_found_as_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rehearsal, "evaluate", too_large)
    with pytest.raises(MemoryExceeded, match="out of memory in validation"):
        train(tiny_run(tmp_path))
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("tokens", "micro", "advice"),
    [
        (
            160,
            None,
            r"with 10 rows of 16 tokens per forward; give --batch\.micro_batch_size 5: 2 forward passes per step",
        ),
        (144, 3, r"with 3 rows of 16 tokens per forward; give --batch\.micro_batch_size 1: 9 forward passes per step"),
        (
            112,
            None,
            r"with 7 rows of 16 tokens per forward; give --batch\.micro_batch_size 1: 7 forward passes per step",
        ),
        (128, 1, r"with 1 rows of 16 tokens per forward; use a smaller --model\.block_size"),
    ],
)
def test_the_advice_keeps_the_step_and_divides_it(tokens: int, micro: int | None, advice: str, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, batch__tokens=tokens, batch__micro_batch_size=micro)
    with pytest.raises(MemoryExceeded, match=advice), memory_errors(training_advice(config)):
        raise torch.OutOfMemoryError


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a bug"), memory_errors(""):
        raise RuntimeError("a bug")


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_a_process_with_little_memory_says_what_would_fit(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The real thing: torch cannot allocate the activations of so many rows."""
    config = tiny_run(tmp_path, model__n_embd=64, batch__tokens=16 * 32768, trainer__max_steps=1)
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 600 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code = 0
        try:
            train(config)
        except MemoryExceeded as error:
            code = error.exit_code
            os.write(2, str(error).encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    said = capfd.readouterr().err
    assert os.waitstatus_to_exitcode(status) == 9, said
    assert "out of memory with 32768 rows of 16 tokens per forward; give --batch.micro_batch_size 16384" in said
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()
