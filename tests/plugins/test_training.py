"""Optimizers, schedules, added losses, readers and what a script passes, through resume, processes and plan."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minigpt
from minigpt.data.batches import IGNORED
from minigpt.data.config import READERS, DataConfig
from minigpt.data.decoding import ReadingLog
from minigpt.data.prepare import prepare
from minigpt.data.reading import read_documents
from minigpt.errors import ConfigError, DataError
from minigpt.model.gpt import GPT
from minigpt.tokenizer.build import load_tokenizer
from minigpt.tokenizer.config import KINDS, TokenizerConfig
from minigpt.tokenizer.plain import ByteTokenizer
from minigpt.training import launch
from minigpt.training.config import LOSSES, OPTIMIZERS, SCHEDULES, OptimizerConfig, TrainConfig
from minigpt.training.plan.plan import measured_step
from minigpt.training.recipe.loss import Added, Objective, plain_loss
from minigpt.training.recipe.optimizer import make_optimizer, optimizer_bytes
from minigpt.training.recipe.schedule import learning_rate
from minigpt.training.run.metrics import read_metrics
from plugged import forgetting, plugged
from toys import random_ids, random_model, tiny_config
from training_runs import assert_equal_to_the_bit, forked, losses, run_and_read, saved_tensors, tiny_run


@pytest.fixture(scope="module", autouse=True)
def _plugged() -> Iterator[None]:
    with plugged("lion", "restarts", "z_loss", "csv_reader"):
        yield


# Optimizers and schedules.

OPTIMIZER_NAMES = [*OPTIMIZERS, "lion"]
SCHEDULE_NAMES = [*SCHEDULES, "restarts"]


def recipe(optimizer: str, schedule: str) -> dict[str, Any]:
    """Changes of a tiny run; learning rates for a model of a few thousand parameters."""
    return {
        "model__preset": "modern",
        "optimizer__name": optimizer,
        "optimizer__schedule": schedule,
        "optimizer__learning_rate": 1e-3,
        "trainer__max_steps": 6,
        "checkpoint__every": 3,
    }


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(o, SCHEDULE_NAMES[(i + k) % 4]) for i, o in enumerate(OPTIMIZER_NAMES) for k in (0, 2)],
)
def test_a_resumed_run_is_the_whole_run(optimizer: str, schedule: str, tmp_path: Path) -> None:
    changes = recipe(optimizer, schedule)
    whole, rows = run_and_read(tiny_run(tmp_path, "whole", **changes))
    parts, _ = run_and_read(tiny_run(tmp_path, "parts", **changes))
    for left in (parts / "checkpoints/step-00000006").iterdir():
        left.unlink()
    (parts / "checkpoints/step-00000006").rmdir()
    parts, again = run_and_read(tiny_run(tmp_path, "parts", **changes))
    assert again[-1]["step"] == 6 and losses(again) == losses(rows)
    assert_equal_to_the_bit(saved_tensors(parts, 6), saved_tensors(whole, 6))
    assert losses(rows)[-1] < losses(rows)[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", OPTIMIZER_NAMES)
def test_two_processes_take_the_steps_of_one(optimizer: str, strategy: str, tmp_path: Path) -> None:
    changes = {**recipe(optimizer, "restarts"), "losses": {"z_loss": 1e-3}, "eval__every": 3}
    _, one = run_and_read(tiny_run(tmp_path, "one", **changes))
    two = tiny_run(tmp_path, "two", trainer__devices=2, trainer__strategy=strategy, **changes)
    assert forked(two) == {0: 0, 1: 0}
    rows = read_metrics(tmp_path / "runs/two/metrics.jsonl")
    for name in ("train/loss", "train/z_loss", "val/loss", "val/z_loss"):
        values = [[row[name] for row in run if name in row] for run in (one, rows)]
        assert len(values[0]) > 1 and values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_the_state_of_an_optimizer_is_counted(name: str) -> None:
    config = OptimizerConfig(name=name)
    model = GPT(tiny_config("modern"))
    optimizer = make_optimizer(model, config)
    ids = random_ids(2, 20)
    plain_loss(model, ids, ids).backward()
    optimizer.step()
    found = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert optimizer_bytes(model.config, config) == found


def test_lion_steps_against_the_sign_of_the_gradient() -> None:
    model = GPT(tiny_config("gpt2"))
    config = OptimizerConfig(name="lion", learning_rate=0.01, settings={"name.decay": 0.0})
    optimizer = make_optimizer(model, config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ids = random_ids(2, 20)
    plain_loss(model, ids, ids).backward()
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new, old - 0.01 * new.grad.sign())


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_a_schedule_stays_between_the_final_and_the_peak_rate(name: str) -> None:
    config = OptimizerConfig(schedule=name, learning_rate=2.0, final_learning_rate=0.5, warmup_steps=4)
    rates = [learning_rate(config, step, 24) for step in range(24)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6]) and rates[4] == 2.0
    assert all(0.5 <= rate <= 2.0 for rate in rates[4:])


def test_restarts_by_hand() -> None:
    config = OptimizerConfig(schedule="restarts", learning_rate=1.0, warmup_steps=0, settings={"schedule.cycles": 2})
    rates = [learning_rate(config, step, 8) for step in range(8)]
    half = [(1 + math.cos(math.pi * p)) / 2 for p in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx(half * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "lino"}, "optimizer.name: 'lino' is not one of muon, adamw, lion; did you mean 'lion'?"),
        ({"optimizer__schedule": "cosin"}, "optimizer.schedule: 'cosin' is not one of cosine, wsd, constant, restarts"),
        ({"optimizer__settings": {"schedule.cycles": 2}}, "optimizer.schedule.cycles: no such setting"),
        ({"losses": {"z_los": 1.0}}, "losses: 'z_los' is not one of z_loss; did you mean 'z_loss'?"),
        ({"losses": {"z_loss": "much"}}, "losses.z_loss: 'much' is not a finite number"),
        ({"losses": {"z_loss.power": 2}}, "losses.z_loss.power: is a setting of z_loss, which has no weight"),
        ({"losses": {"z_loss": 1.0, "z_loss.pwoer": 2}}, "losses.z_loss.pwoer: no such setting; did you mean power?"),
        ({"log": "wand"}, "log: 'wand' is not one of none, wandb, tensorboard; did you mean 'wandb'?"),
    ],
)
def test_an_unknown_name_is_refused_in_python_too(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, **changes).check()
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


# Added losses.


def with_z_loss(weight: float = 0.1) -> Objective:
    return Objective.of({"z_loss": weight})


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("chunks", [1, 5])
def test_an_added_loss_has_the_gradient_of_its_formula(
    chunks: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(tiny_config("modern", logit_softcap=softcap)).double()
    ids, targets = random_ids(2, 20), random_ids(2, 20, seed=1)
    targets[0, 5:] = IGNORED
    monkeypatch.setattr("minigpt.training.recipe.loss.CPU_LOGITS", 40 * model.vocab_size // chunks)

    def formula() -> torch.Tensor:
        logits = model(ids).flatten(0, 1)[targets.flatten() != IGNORED]
        z = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits, targets.flatten()[targets.flatten() != IGNORED]) + 0.1 * z

    expected = torch.autograd.grad(formula(), list(model.parameters()))
    found = with_z_loss()(model, ids, targets)
    torch.testing.assert_close(found.total, formula())
    assert float(found.means[0] + 0.1 * found.means[1]) == pytest.approx(found.total.item())
    for a, b in zip(torch.autograd.grad(found.total, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_of_weight_zero_changes_nothing_and_is_measured(tmp_path: Path) -> None:
    _, plain = run_and_read(tiny_run(tmp_path, "plain"))
    _, watched = run_and_read(tiny_run(tmp_path, "watched", losses={"z_loss": 0.0}))
    assert losses(watched) == pytest.approx(losses(plain), rel=1e-6)
    assert all(row["train/z_loss"] > 0 for row in watched if "train/loss" in row)


def test_accumulation_averages_an_added_loss(tmp_path: Path) -> None:
    runs = [
        run_and_read(tiny_run(tmp_path, f"rows{rows}", losses={"z_loss": 0.01}, batch__micro_batch_size=rows))[1]
        for rows in (8, 2)
    ]
    values = [[row["train/z_loss"] for row in rows if "train/z_loss" in row] for rows in runs]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_plan_times_the_added_loss(tmp_path: Path) -> None:
    called = []

    def counted(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        called.append(len(targets))
        return logits.sum(-1) * 0

    with forgetting():
        LOSSES.add("counted", counted, "", __name__, {})
        config = tiny_run(tmp_path, losses={"counted": 1.0}, model__vocab_size=257)
        assert measured_step(config, torch.device("cpu")) > 0
    assert called == [128] * 4


def test_a_loss_of_the_wrong_shape_is_named() -> None:
    model, ids = random_model(tiny_config("gpt2")), random_ids(1, 8)
    objective = Objective([Added("mean", 1.0, lambda logits, targets: logits.mean())])
    with pytest.raises(ConfigError, match=r"losses\.mean: returned shape \(\); expected one number per token, \(8,\)"):
        objective(model, ids, ids)


# Readers.


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_csv_file_is_documents(packed: str, tmp_path: Path) -> None:
    text = 'text,n\n"one, two",1\r\nthree\ufeff,2\n"a\nb",3\n'
    path = tmp_path / f"d.csv{packed}"
    compress = zlib.compressobj(wbits=31)
    content = text.encode()
    path.write_bytes(compress.compress(content) + compress.flush() if packed else content)
    pieces = list(read_documents(path, DataConfig(), ReadingLog()))
    assert [piece.text for piece in pieces] == ["one, two", "three\ufeff", "a\nb"] and all(p.ends for p in pieces)
    other = DataConfig(settings={"reader.csv.column": "n"})
    assert [piece.text for piece in read_documents(path, other, ReadingLog())] == ["1", "2", "3"]


def test_a_reader_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text\nx\n")
    with pytest.raises(DataError, match=r"d\.csv: reader '\.csv' \(csv_reader\) failed \(KeyError: 'title'\)"):
        list(read_documents(path, DataConfig(settings={"reader.csv.column": "title"}), ReadingLog()))
    with pytest.raises(ConfigError, match=r"data\.reader\.csv\.colunm: no such setting; did you mean column"):
        DataConfig(settings={"reader.csv.colunm": "x"}).check()


def test_a_corpus_knows_its_reader_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.csv").write_text("text,n\n" + "one two,1\n" * 50)
    data = DataConfig(source=str(tmp_path / "d.csv"), folder=str(tmp_path / "data"))
    first = prepare(data, TokenizerConfig(), show=False)
    assert first.manifest["source"]["readers"][".csv"]["module"] == "csv_reader"
    assert prepare(data, TokenizerConfig(), show=False).folder == first.folder
    monkeypatch.setattr(READERS[".csv"], "version", "2", raising=False)  # other code under the same name
    monkeypatch.setattr(READERS.rows[".csv"].target, "version", "2", raising=False)
    again = prepare(data, TokenizerConfig(), show=False)
    assert again.manifest["source"]["readers"][".csv"]["version"] == "2"
    other = prepare(replace(data, settings={"reader.csv.column": "n"}), TokenizerConfig(), show=False)
    assert other.hash != first.hash


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_says_what_it_learns_from(kind: str) -> None:
    assert KINDS[kind].learns == {"char": "all", "bpe": "train"}.get(kind, "")


# What a script passes.


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.steps, self.model = 0, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps, self.model = self.steps + 1, pl_module.model


TEXTS = [f"document {number}: the cat sat on the mat" for number in range(60)]


def of_script(folder: Path, name: str, **changes: Any) -> TrainConfig:
    config = tiny_run(folder, name, eval__every=4, **changes)
    return replace(config, data=replace(config.data, source="nowhere"))


def test_texts_of_a_script_are_a_run_that_goes_on(tmp_path: Path) -> None:
    seen = Seen()
    run = minigpt.train(of_script(tmp_path, "run"), documents=iter(TEXTS), callbacks=[seen])
    assert seen.steps == 8 and isinstance(seen.model, GPT)
    assert run.folder == tmp_path / "runs/run" and not run.model.training
    assert run.metrics["step"][-1] == 8 and np.isfinite(run.metrics.series("val/loss")[1]).all()
    stored = TrainConfig.from_dict(run.config)
    again = minigpt.train(replace(stored, trainer=replace(stored.trainer, max_steps=10)))  # without the texts
    assert again.metrics.series("train/loss")[0].tolist() == list(range(1, 11))


def test_token_ids_of_a_script_are_the_corpus_of_its_texts(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    texts = minigpt.train(of_script(tmp_path, "texts"), tokenizer=tokenizer, documents=TEXTS)
    ids = [tokenizer.encode(text) for text in TEXTS]
    run = minigpt.train(of_script(tmp_path, "ids"), tokenizer=tokenizer, documents=ids)
    for name in ("train/loss", "val/loss", "val/bpb"):
        assert run.metrics.series(name)[1].tolist() == texts.metrics.series(name)[1].tolist()
    with pytest.raises(ConfigError, match="their tokenizer is needed; give tokenizer="):
        minigpt.train(of_script(tmp_path, "no"), documents=ids)
    with pytest.raises(DataError, match="0 has token id 999; the tokenizer has 257 ids"):
        minigpt.train(of_script(tmp_path, "no"), documents=[[1, 999]], tokenizer=tokenizer)


class Doubled(GPT):
    """A subclass: twice the logits."""

    def forward(self, ids: Any, cache: Any = None) -> Any:
        return 2 * super().forward(ids, cache)


def test_a_subclass_trains_and_says_what_opens_it(tmp_path: Path) -> None:
    config = of_script(tmp_path, "run")
    model = Doubled(replace(config.model, vocab_size=257))
    start = model.unembed.weight.detach().clone()
    run = minigpt.train(config, model=model, documents=TEXTS)
    assert type(run.model) is Doubled and not torch.equal(model.unembed.weight, start)  # trained in place
    from minigpt.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"modules of other classes \(the model: .*Doubled\)"):
        minigpt.load(run.folder)
    with pytest.raises(CheckpointError, match="this is not the model that was saved"):
        minigpt.load(run.folder, model=GPT)
    ids = random_ids(1, 8)
    torch.testing.assert_close(minigpt.load(run.folder, model=Doubled).model(ids), run.model(ids))


def test_a_loss_of_a_script_is_added_and_logged(tmp_path: Path) -> None:
    with forgetting():
        run = minigpt.train(
            of_script(tmp_path, "run"),
            documents=TEXTS,
            losses={"size": (1e-3, lambda logits, targets: logits.square().mean(-1))},
        )
        assert {"train/size", "val/size"} <= set(run.metrics)
    with pytest.raises(ConfigError, match="losses: 'size' is not one of z_loss"):
        launch.train(TrainConfig.from_dict(run.config))


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"model": "gpt"}, "train: model is str; expected a GPT"),
        ({"documents": "one text"}, "documents: is one text; give a list of texts"),
        ({"documents": []}, "documents: there are none"),
        ({"documents": ["a", [1]]}, "documents: 1 is a list of token ids, the ones before are not"),
        ({"documents": [3.5]}, "documents: 0 is float; expected a text or a flat list of token ids"),
    ],
)
def test_what_cannot_be_trained_on_is_named(objects: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        minigpt.train(of_script(tmp_path, "run"), **objects)
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_objects_do_not_reach_other_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="callbacks= do not reach other processes"):
        minigpt.train(of_script(tmp_path, "run", trainer__devices=2), documents=TEXTS, callbacks=[Seen()])
    with forgetting():
        LOSSES.add("mine", lambda logits, targets: logits.sum(-1), "", "__main__", {})
        with pytest.raises(ConfigError, match="losses 'mine': was registered in a script"):
            minigpt.train(of_script(tmp_path, "run", trainer__devices=2, losses={"mine": 1.0}), documents=TEXTS)


def test_the_chart_of_metrics_is_svg(tmp_path: Path) -> None:
    run = minigpt.train(of_script(tmp_path, "run"), documents=TEXTS)
    chart = run.metrics.plot("train/loss", "val/loss")
    from xml.etree import ElementTree

    tree = ElementTree.parse(io.StringIO(chart._repr_svg_()))
    lines = [line for line in tree.iter("{http://www.w3.org/2000/svg}polyline") if line.get("stroke-width")]
    assert [len(line.get("points", "").split()) for line in lines] == [8, 2]
    assert chart.save(tmp_path / "loss.svg").is_file()
    with pytest.raises(ConfigError, match="metrics: 'val/los' is not one of"):
        run.metrics["val/los"]
    assert load_tokenizer(run.path).kind == "byte"
