"""The training loop against plain loops and hand-worked numbers."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minigpt
from minigpt.data.batches import Batches
from minigpt.data.prepare import prepare
from minigpt.errors import CheckpointError, ConfigError, DataError, Interrupted, MemoryExceeded, NonFiniteError
from minigpt.model.gpt import GPT
from minigpt.training.config import OptimizerConfig, TrainConfig
from minigpt.training.launch import train
from minigpt.training.recipe import loss as training_loss
from minigpt.training.recipe.schedule import learning_rate
from minigpt.training.run.metrics import read_metrics, rewind_metrics
from minigpt.training.run.settle import settle
from training_runs import losses, run_and_read, saved_tensors, tiny_run


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_losses_equal_those_of_a_plain_loop_over_transformers(preset: str, tmp_path: Path) -> None:
    from toys import transformers_twin

    config = tiny_run(
        tmp_path, model__preset=preset, trainer__max_steps=20, batch__micro_batch_size=4, optimizer__weight_decay=0.3
    )
    _, rows = run_and_read(config)

    corpus = prepare(config.data, config.tokenizer)
    batches = Batches(corpus.train, 16, config.batch_size, config.seed)
    torch.manual_seed(config.seed)
    twin = transformers_twin(
        GPT(settle(tiny_run(tmp_path, "other", model__preset=preset), ExitStack()).config.model)
    ).train()
    decayed = [p for p in twin.parameters() if p.dim() >= 2]
    plain = [p for p in twin.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    expected = []
    for step in range(20):
        ids, targets = batches.read(step)
        loss = F.cross_entropy(twin(ids).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        # cosine after two steps of warm-up, written out
        rate = 1e-2 * (step + 1) / 3 if step < 2 else 1e-2 * (1 + math.cos(math.pi * (step - 2) / 18)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        expected.append(loss.item())
    assert losses(rows) == pytest.approx(expected, abs=1e-5)
    assert losses(rows)[-1] < losses(rows)[0] - 1


@pytest.mark.parametrize("preset", ["gpt2", "modern"])
def test_accumulated_micro_batches_equal_the_whole_batch(preset: str, tmp_path: Path) -> None:
    whole = run_and_read(tiny_run(tmp_path, "whole", model__preset=preset))
    parts = run_and_read(tiny_run(tmp_path, "parts", model__preset=preset, batch__micro_batch_size=2))
    assert losses(parts[1]) == pytest.approx(losses(whole[1]), abs=1e-5)
    norms = [[row["grad_norm"] for row in rows if "grad_norm" in row] for _, rows in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_validation_is_the_mean_over_every_token(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, eval__every=4)
    run, rows = run_and_read(config)
    found = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in found] == [4, 8]
    model = minigpt.load(run).model
    corpus = prepare(config.data, config.tokenizer)
    ids = torch.from_numpy(corpus.val.read([0], len(corpus.val)))[0]
    nats = 0.0
    with torch.no_grad():  # one window after the other, token by token
        for begin in range(0, len(ids) - 1, 16):
            window = ids[begin : begin + 17]
            log_probs = model(window[None, :-1])[0].log_softmax(-1)
            nats -= sum(log_probs[i, token].item() for i, token in enumerate(window[1:]))
    tokens = len(ids) - 1
    assert found[-1]["val/tokens"] == tokens
    assert found[-1]["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found[-1]["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found[-1]["val/bpb"] == pytest.approx(nats / tokens / math.log(2), rel=1e-5)  # one byte a token


def test_rows_count_the_tokens_that_were_consumed(tmp_path: Path) -> None:
    _, rows = run_and_read(tiny_run(tmp_path, batch__micro_batch_size=4, trainer__log_every_n_steps=3))
    assert [(row["step"], row["tokens"]) for row in rows if "train/loss" in row] == [(3, 384), (6, 768), (8, 1024)]


def test_the_stored_config_reproduces_the_run(tmp_path: Path) -> None:
    import yaml

    run, rows = run_and_read(tiny_run(tmp_path, model__preset="modern", model__dropout=0.1))
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["model"]["n_inner"] == 64  # every field has its number
    _, rows_again = run_and_read(TrainConfig.from_dict({**stored, "run_name": "again"}))
    assert losses(rows_again) == losses(rows)


def test_samples_are_written_and_disturb_nothing(tmp_path: Path) -> None:
    _, plain = run_and_read(tiny_run(tmp_path, "plain", model__dropout=0.2))
    run, rows = run_and_read(
        tiny_run(
            tmp_path,
            "watched",
            model__dropout=0.2,
            sample__every=3,
            sample__max_new_tokens=5,
            sample__prompt="the ",
            eval__every=2,
        )
    )
    assert losses(rows) == losses(plain)
    written = sorted((run / "samples").iterdir())
    assert [path.name for path in written] == [f"step-0000000{n}.txt" for n in (3, 6, 8)]
    assert all(path.read_text().startswith("the ") for path in written)


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training_loss.next_token_loss
    calls = []

    def sometimes_nan(model: GPT, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(model, ids, targets) * (float("nan") if len(calls) == 9 else 1.0)  # one was rehearsed

    run_and_read(tiny_run(tmp_path, "good", trainer__max_steps=7, optimizer__schedule="constant"))
    monkeypatch.setattr(training_loss, "next_token_loss", sometimes_nan)
    run, rows = run_and_read(tiny_run(tmp_path, "bad", optimizer__schedule="constant"))
    assert rows[7]["train/loss"] is None  # step 8, written as null: NaN is no JSON
    good, bad = saved_tensors(tmp_path / "runs/good", 7), saved_tensors(run, 8)
    assert all(torch.equal(good[name], bad[name]) for name in good)


def test_without_a_compiler_training_goes_on_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler(function: object, **options: object):
        def compiled(*arguments: object) -> None:
            raise InvalidCxxCompiler

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    _, plain = run_and_read(tiny_run(tmp_path, "plain"))
    _, rows = run_and_read(tiny_run(tmp_path, "compiled", trainer__compile=True))
    assert losses(rows) == losses(plain)
    assert capsys.readouterr().err.count("torch.compile does not work here") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_how_to_need_less(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(training_loss, "next_token_loss", too_large)
    with pytest.raises(MemoryExceeded, match=r"with 8 rows of 16 tokens per forward; give --batch\.micro_batch_size 4"):
        train(tiny_run(tmp_path))


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(training_loss, "next_token_loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny_run(tmp_path))


def test_ctrl_c_before_the_first_step_has_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.training.run.checkpoints import Checkpoints

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "on_fit_start", interrupted)
    with pytest.raises(Interrupted, match="--resume auto") as raised:
        train(tiny_run(tmp_path))
    assert raised.value.exit_code == 130


def test_wandb_goes_offline_where_its_server_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import lightning.pytorch.loggers

    from minigpt.training.run.loggers import make_loggers

    class Unreachable:
        def __init__(self, offline: bool, **options: object) -> None:
            self.offline = offline

        @property
        def experiment(self) -> str:
            if not self.offline:
                raise ConnectionError("no answer")
            return "a run"

    monkeypatch.setattr(lightning.pytorch.loggers, "WandbLogger", Unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    loggers = make_loggers(tiny_run(tmp_path, log="wandb"), tmp_path, 0)
    assert isinstance(loggers, list)
    [logger] = loggers
    assert logger.offline
    assert "the server cannot be used (no answer); logging offline" in capsys.readouterr().err


def test_gradients_that_stay_nan_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loss, "next_token_loss", lambda model, ids, targets: model(ids).mean() * float("nan"))
    with pytest.raises(NonFiniteError, match="5 steps in a row; the weights did not change"):
        train(tiny_run(tmp_path))


def test_schedules_by_hand() -> None:
    cosine = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, schedule="cosine")
    assert [learning_rate(cosine, step, 104) for step in (0, 3, 4, 54, 104)] == pytest.approx(
        [0.2, 0.8, 1.0, 0.55, 0.1]
    )
    wsd = OptimizerConfig(
        learning_rate=1.0, final_learning_rate=0.0, warmup_steps=10, schedule="wsd", decay_fraction=0.5
    )
    assert [learning_rate(wsd, step, 100) for step in (9, 10, 49, 50, 75, 99)] == pytest.approx(
        [10 / 11, 1.0, 1.0, 1.0, 0.5, 0.02]
    )
    constant = OptimizerConfig(learning_rate=0.3, warmup_steps=0, schedule="constant")
    assert learning_rate(constant, 0, 10) == learning_rate(constant, 9, 10) == 0.3


def test_best_losses_are_over_the_same_tokens(tmp_path: Path) -> None:
    train(tiny_run(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be resumed with eval\.tokens 1000000 -> 100; choose another"):
        train(tiny_run(tmp_path, eval__tokens=100, trainer__max_steps=9))


def test_another_processor_is_announced_at_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train(tiny_run(tmp_path))
    train(tiny_run(tmp_path, trainer__max_steps=9))
    assert "not to the bit" not in capsys.readouterr().err
    monkeypatch.setattr("minigpt.training.run.checkpoints.processor", lambda: "Z80")
    train(tiny_run(tmp_path, trainer__max_steps=10))
    assert re.search(
        r"resuming, but not bit-identical, since the environment changed: processor .+ -> Z80\n",
        capsys.readouterr().err,
    )


def test_rows_past_the_checkpoint_move_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "x": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "x')
    rewind_metrics(path, 2)
    assert read_metrics(path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2}]
    assert read_metrics(tmp_path / "metrics-past-00000002.jsonl") == [{"step": 3, "x": 3}, {"step": 4, "x": 4}]
    assert path.read_text().endswith("\n")
    assert len(synced) >= 2  # a run counts its validations by these rows: they outlast a power cut


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch__tokens": 100}, r"batch\.tokens: 100 is not a multiple of model\.block_size \(16\); try 96"),
        ({"batch__micro_batch_size": 3}, r"8 rows per step .* do not divide among 1 processes x micro_batch_size 3"),
        ({"batch__micro_batch_size": 0}, r"batch\.micro_batch_size: 0 is not a finite number above 0"),
        ({"eval__patience": 2, "eval__every": 0}, r"eval\.patience: 2 counts validations, but eval\.every is 0"),
        ({"checkpoint__keep": 1}, r"checkpoint\.keep: 1 is less than 2"),
        ({"optimizer__learning_rate": 0.0}, r"optimizer\.learning_rate: 0\.0 is not a finite number above 0"),
        ({"seed": 10**30}, r"seed: 1000000000000000000000000000000 is not below 2\*\*63"),
        ({"trainer__devices": 0}, r"trainer\.devices: 0 is not positive"),
        ({"trainer__accelerator": "mps"}, r"trainer\.accelerator: mps, but torch sees none here"),
        ({"optimizer__beta2": 1.0}, r"optimizer\.beta2: 1\.0 is not in \[0, 1\)"),
        ({"name": "../escape"}, r"run_name: '\.\./escape' is not a plain folder name"),
        ({"model__vocab_size": 100}, r"model\.vocab_size: 100 is less than the tokenizer's 257"),
        ({"trainer__num_nodes": 2}, r"trainer\.num_nodes: 2 machines need torchrun"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_run(tmp_path, **changes))
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_a_text_shorter_than_a_block_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8192 \\+ 1 = 8193"):
        train(tiny_run(tmp_path, model__block_size=8192, batch__tokens=8192))


def test_resume_modes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume there"):
        train(tiny_run(tmp_path, resume="must"))
    with pytest.raises(ConfigError, match=r"run_name: --resume must needs one"):
        train(replace(tiny_run(tmp_path, resume="must"), run_name=None))
    assert not (tmp_path / "runs").exists()
    train(tiny_run(tmp_path))
    with pytest.raises(ConfigError, match="exists already"):
        train(tiny_run(tmp_path, resume="never"))
    before = (tmp_path / "runs/run/metrics.jsonl").read_bytes()
    train(tiny_run(tmp_path))  # finished: says so and leaves everything as it is
    assert (tmp_path / "runs/run/metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match=r"cannot be resumed with model\.n_layer 2 -> 3"):
        train(tiny_run(tmp_path, model__n_layer=3))
    with pytest.raises(ConfigError, match=r"seed 3 -> 4"):
        train(tiny_run(tmp_path, seed=4))


def test_a_changed_text_is_noticed_at_resume(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    train(config)
    text = Path(config.data.source)
    text.write_text(text.read_text().replace("rats", "cats", 1))
    with pytest.raises(DataError, match="has changed since"):
        train(replace(config, trainer=replace(config.trainer, max_steps=9)))


def test_lightning_still_has_what_progress_touches() -> None:
    import lightning.pytorch as pl

    from minigpt.training.run.progress import LightModule, set_progress, without_signals

    trainer = pl.Trainer(max_steps=9, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    set_progress(trainer, 5)
    without_signals(trainer)
    assert trainer.global_step == 5
    assert "_current_fx_name" in vars(pl.LightningModule())  # what LightModule sets by a shorter way
    assert "_current_fx_name" in vars(LightModule())


def test_a_run_can_log_to_wandb_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, rows = run_and_read(tiny_run(tmp_path, log="wandb", trainer__max_steps=3))
    assert losses(rows)
    assert json.loads((run / "wandb.json").read_text())["id"]
    assert list(run.glob("wandb/offline-run-*"))


def test_a_logger_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda *_, **__: 1 / 0)
    _, rows = run_and_read(tiny_run(tmp_path, log="wandb", trainer__max_steps=3))
    assert len(losses(rows)) == 3
    assert capsys.readouterr().err.count("--log wandb failed and is now off") == 1
