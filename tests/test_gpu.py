"""The three doors on a GPU give what they give on the CPU. MINIGPT_TEST_DEVICE=cuda runs these; cpu tries them."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.cli.main import main
from minigpt.internals.study import Study
from minigpt.model.fast import fast
from minigpt.model.gpt import GPT
from minigpt.sampling.run import load
from minigpt.sampling.sampler import Sampler
from minigpt.training.recipe import loss as loss_module
from minigpt.training.recipe.loss import Objective, compiled, plain_loss
from table_model import LetterTokenizer
from toys import PRESETS, random_ids, random_model, tiny_config
from training_runs import losses, run_and_read, saved_tensors, tiny_run

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("MINIGPT_TEST_DEVICE")
ACCELERATOR = {"cuda": "gpu", None: "cpu"}.get(DEVICE, DEVICE)
DTYPES = [torch.float64, torch.float32]


def pair(preset: str, dtype: torch.dtype) -> tuple[GPT, GPT]:
    """The same model on the CPU and on the device."""
    model = random_model(tiny_config(preset, vocab_size=24)).to(dtype)
    return model, copy.deepcopy(model).to(DEVICE)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}


# Training.


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 2e-2)])
def test_the_loss_falls_as_on_the_cpu_and_a_resumed_run_is_the_run(
    preset: str, precision: str, tolerance: float, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "model__preset": preset,
        "model__dropout": 0.1,
        "optimizer__name": "muon" if preset == "modern" else "adamw",
        "optimizer__schedule": "constant",
        "batch__micro_batch_size": 4,
        "checkpoint__every": 4,
        "checkpoint__keep": 10,
        "eval__every": 4,
        "sample__max_new_tokens": 5,
    }
    on_device = {"trainer__accelerator": ACCELERATOR, "trainer__precision": precision}
    config = tiny_run(tmp_path, **changes, **on_device)
    run, rows = run_and_read(config)
    assert len(losses(rows)) == 8
    assert losses(rows)[-1] < losses(rows)[0] - 0.3
    saved = saved_tensors(run, 8)

    shutil.rmtree(run / "checkpoints/step-00000008")
    _, again = run_and_read(config)
    assert losses(again) == pytest.approx(losses(rows), rel=tolerance)
    for name, tensor in saved_tensors(run, 8).items():
        # Sums on a GPU come in any order; what Adam divides by a small number shows it.
        difference = float((tensor.double() - saved[name].double()).norm())
        assert difference <= 10 * tolerance * float(saved[name].double().norm()) + 1e-6, name

    changes["model__dropout"] = 0.0  # each device draws its own
    _, there = run_and_read(tiny_run(tmp_path, "there", **changes, **on_device))
    _, here = run_and_read(tiny_run(tmp_path, "here", **changes))
    assert losses(there) == pytest.approx(losses(here), rel=10 * tolerance)
    values = [[row["val/loss"] for row in rows if "val/loss" in row] for rows in (there, here)]
    assert values[0] and values[0] == pytest.approx(values[1], rel=10 * tolerance)


def gradients(model: GPT, compute: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids, targets = (random_ids(3, 24, 24, seed).to(model.device) for seed in (1, 2))
    value = compute(model, ids, targets)
    value.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach().cpu(), **found}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_compiled_loss_in_chunks_has_the_gradients_of_the_plain_one(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("CPU_LOGITS", "GPU_LOGITS"):
        monkeypatch.setattr(loss_module, name, 24 * 20)  # 20 rows of 72
    torch.compiler.reset()
    here, there = pair(preset, torch.float32)
    expected, found = gradients(here, plain_loss), gradients(there, lambda *batch: compiled(Objective())(*batch).total)
    assert "does not work" not in capsys.readouterr().err
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# Sampling.

PROMPTS = ["abcabc", "b", "cdefghij", "aa"]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9, "seed": [5, 6, 7, 8], "num_return_sequences": 2},
    "penalties": {
        "temperature": 0.8,
        "seed": [5, 6, 7, 8],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_p": 0.02,
    },
    "beams": {"temperature": 0.0, "num_beams": 3},
}


def texts(model: Any, prompts: list[Any], **settings: Any) -> list[list[list[int]]]:
    found = Sampler(model, LetterTokenizer(24)).generate(prompts, max_new_tokens=14, **settings)
    return [[completion.ids for completion in samples] for samples in found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("how", SETTINGS)
def test_texts_are_those_of_the_cpu_alone_and_in_ragged_batches(how: str, preset: str, dtype: torch.dtype) -> None:
    here, there = pair(preset, dtype)
    settings = SETTINGS[how]
    together = texts(there, PROMPTS, **settings)
    assert together == texts(here, PROMPTS, **settings)
    assert len({tuple(sample) for samples in together for sample in samples}) > 2
    for number, prompt in enumerate(PROMPTS):
        alone = {**settings, "seed": settings["seed"][number]} if "seed" in settings else settings
        assert texts(there, [prompt], **alone) == [together[number]]
    assert texts(fast(there, len(PROMPTS)), PROMPTS, **settings) == together


@pytest.mark.parametrize("preset", PRESETS)
def test_a_compiled_step_writes_the_same_texts(preset: str, capsys: pytest.CaptureFixture) -> None:
    here, there = pair(preset, torch.float32)
    assert texts(fast(there, 4, compiled=True), PROMPTS, temperature=0.0) == texts(here, PROMPTS, temperature=0.0)
    assert "does not work" not in capsys.readouterr().err


# Studying.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_activations_losses_and_edits_are_those_of_the_cpu(preset: str, dtype: torch.dtype) -> None:
    here, there = (Study.of(model) for model in pair(preset, dtype))
    ids = random_ids(2, 9, 24)
    (logits, cache), (their_logits, their_cache) = (
        study.run_with_cache(ids, lambda _: True) for study in (here, there)
    )
    torch.testing.assert_close(their_logits.cpu(), logits, **close(dtype))
    assert set(their_cache) == set(cache)
    for name, value in cache.items():
        assert their_cache[name].device == there.model.device
        torch.testing.assert_close(their_cache[name].cpu(), value, **close(dtype), msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(there.losses(ids).cpu(), here.losses(ids), **close(dtype))
    edited = []
    for study in (here, there):
        with study.hooks({("z", 0): 0.0}):
            edited.append(study.logits(ids).cpu())
    torch.testing.assert_close(edited[1], edited[0], **close(dtype))
    assert not torch.allclose(edited[0], logits)


# The doors as a user opens them.


def test_a_run_trained_there_is_sampled_evaluated_and_studied_alike_on_both(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, _ = run_and_read(tiny_run(tmp_path, trainer__accelerator=ACCELERATOR, trainer__max_steps=20))
    assert load(run, device=str(DEVICE)).model.device.type == DEVICE

    def said(*arguments: str) -> list[str]:
        capsys.readouterr()
        found = []
        for device in ("cpu", str(DEVICE)):
            assert main([*arguments, "--device", device]) == 0
            found.append(capsys.readouterr().out)
        return found

    written = said("sample", str(run), "--prompt", "the cat", "--temperature", "0", "--max_new_tokens", "20")
    assert written[0] == written[1] and written[0].strip()
    here, there = (json.loads(each) for each in said("eval", str(run), "--json"))
    assert (there["tokens"], there["bytes"]) == (here["tokens"], here["bytes"])
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
    assert all(each.strip() for each in said("lens", str(run), "--text", "the cat"))
