"""What was saved is never lost: kills, failing calls, power cuts, full disks, links, numbers that are not finite."""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fault_disks as disks
import fault_trials as trials
import minigpt
from minigpt import durable
from minigpt.checkpoint import manifest, pruning, runs, saving
from minigpt.checkpoint.pruning import prune
from minigpt.errors import CheckpointError, ConfigError, DiskError, NonFiniteError
from minigpt.model.cost import cost_of
from minigpt.training.launch import train
from minigpt.training.run.metrics import read_metrics
from training_runs import tiny_run

posix = pytest.mark.skipif(os.name != "posix", reason="forks, signals and limits as Unix has them")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


# Kills, failing calls, power cuts: each a few; benchmarks/faults.py does them by the hundred.


@posix
@pytest.mark.parametrize("how", ["kill", errno.EIO, errno.ENOSPC])
def test_a_save_that_fails_at_any_call_loses_nothing(how: int | str, tmp_path: Path) -> None:
    calls = random.Random(str(how)).sample(range(86), 12)
    assert trials.every_call(tmp_path, how, calls) == (12, [])


@linux
def test_a_power_cut_at_any_call_loses_nothing(tmp_path: Path) -> None:
    count, wrong = disks.power_cuts(tmp_path)
    assert count > 100 and not wrong


@linux
def test_what_was_not_synced_would_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power cut finds fault with a save that does not sync: without this the test above could not fail."""
    monkeypatch.setattr(saving, "sync", lambda path: None)
    assert disks.power_cuts(tmp_path)[1]


@posix
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert trials.in_child(lambda: train(trials.busy_config(tmp_path, "reference"))) == 0
    expected = trials.outcome(tmp_path / "runs/reference")
    killed, finished, wrong = trials.chain(tmp_path, expected, longest=2.0, kills=3, seed=1)
    assert finished == 1 and not wrong, (killed, wrong)


# Disks.


@linux
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(tmp_path: Path) -> None:
    if not disks.may_mount(tmp_path):
        pytest.skip("mounting is not permitted here")
    assert trials.in_child(lambda: train(trials.busy_config(tmp_path, "reference"))) == 0
    expected = trials.outcome(tmp_path / "runs/reference")
    shutil.rmtree(tmp_path / "runs")
    assert disks.full_disk_run(tmp_path, 400_000, expected) == []


@linux
@pytest.mark.parametrize("size", [8192, 32768, 1 << 20])
def test_a_disk_of_any_size_keeps_the_last_good_checkpoint(size: int, tmp_path: Path) -> None:
    if not disks.may_mount(tmp_path):
        pytest.skip("mounting is not permitted here")
    assert disks.small_disk(tmp_path, size) == ("fits" if size == 1 << 20 else "full")


@posix
@pytest.mark.parametrize("size", [0, 5000, 1 << 20])
def test_a_limit_on_file_sizes_keeps_the_last_good_checkpoint(size: int, tmp_path: Path) -> None:
    assert disks.small_files(tmp_path, size) == ("fits" if size == 1 << 20 else "full")


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials.save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    mount = durable.mount_of(tmp_path)
    with pytest.raises(DiskError, match=rf"step-00000002: 1\.\d MB needed, 0\.5 MB free on {mount}; free some") as told:
        trials.save(tmp_path, 2)
    assert told.value.exit_code == 6
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    with pytest.raises(DiskError, match=r"MB needed"):  # a run finds it out before its first step
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
        train(tiny_run(tmp_path))
    assert not read_metrics(tmp_path / "runs/run/metrics.jsonl")


@pytest.mark.parametrize(("ema_decay", "tensors"), [(0.0, 3), (0.9, 4)])  # weights, two moments, the average
def test_a_disk_that_cannot_hold_a_checkpoint_is_found_at_the_start(
    ema_decay: float, tensors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, optimizer__ema_decay=ema_decay)
    size = 4 * cost_of(replace(config.model, vocab_size=257)).parameters
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=tensors * size - 1))
    with pytest.raises(DiskError, match=rf"checkpoints: {tensors * size / 1e6:.1f} MB needed"):
        train(config)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk is full \(1\.\d MB needed, [\d.]+ MB free on /"),
        (errno.EDQUOT, r"a disk quota or file size limit \(ulimit -f\) was reached \(1\.\d MB needed"),
        (errno.EFBIG, r"a disk quota or file size limit"),
        (errno.EROFS, r"not writable .*; choose another folder"),
        (errno.EIO, r"cannot be written .*; files saved earlier are untouched"),
    ],
)
def test_each_fault_of_a_disk_has_its_line(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match=message) as raised:
        trials.save(tmp_path, 1)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("checkpoints/*")) and not list(tmp_path.glob("checkpoints/.*"))


@posix
def test_a_start_that_is_killed_while_it_tries_the_folder_leaves_nothing_for_good(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if not child:  # killed between trying to write and removing what it wrote
            os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            durable.probe_writing(folder, "")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert list(folder.glob(".probe.*"))
    pruning.make_ready(tmp_path)
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/checkpoints").write_text("a file")
    with pytest.raises(DiskError, match=r"run/checkpoints: cannot be written"):
        train(tiny_run(tmp_path))
    if sys.platform == "linux" and disks.may_mount(tmp_path):
        (tmp_path / "runs/run/checkpoints").unlink()

        def work() -> None:
            disks.mount_tmpfs(tmp_path / "runs/run", 1 << 20, read_only=True)
            train(tiny_run(tmp_path))

        assert trials.in_child(work) == DiskError.exit_code


def test_bytes_that_go_wrong_on_their_way_to_the_disk_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = safetensors.torch.save_file

    def lossy(tensors: dict[str, torch.Tensor], path: Path, metadata: dict) -> None:
        real({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\x01")

    monkeypatch.setattr(safetensors.torch, "save_file", lossy)
    with pytest.raises(CheckpointError, match="does not read back as it was written; check the disk"):
        trials.save(tmp_path, 1)
    assert not list(tmp_path.glob("checkpoints/step*"))


def test_numbers_that_are_not_finite_are_never_saved_and_never_resumed(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    run = train(config)
    newest = run / "checkpoints/step-00000008"
    model = minigpt.load(newest).model
    with torch.no_grad():
        model.trunk.norm.weight[3] = math.inf
    with pytest.raises(NonFiniteError, match=r"step-00000009: not saved, since trunk\.norm\.weight holds NaN") as told:
        saving.save_checkpoint(run / "checkpoints/step-00000009", model, minigpt.load(newest).tokenizer)
    assert told.value.exit_code == 7
    assert [path.name for path in runs.checkpoints_of(run)] == ["step-00000008"]

    file = newest / "training_state.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["exp_avg/trunk.embed.weight"][0, 0] = math.nan
    safetensors.torch.save_file(tensors, file)
    (newest / "manifest.json").unlink()
    manifest.write_manifest(newest)
    with pytest.raises(NonFiniteError, match=r"cannot be resumed, since exp_avg/trunk\.embed\.weight holds NaN"):
        train(replace(config, trainer=replace(config.trainer, max_steps=9)))


def test_links_out_of_a_run_are_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        trials.save(tmp_path / "run", step)
        trials.save(tmp_path / "other", step)
    folder = tmp_path / "run/checkpoints"
    shutil.rmtree(folder / "step-00000002")
    (folder / "step-00000002").symlink_to(tmp_path / "other/checkpoints/step-00000002")
    said: list[str] = []
    assert runs.newest_valid(tmp_path / "run", said.append) == folder / "step-00000001"
    assert f"leads out of the run, to {tmp_path / 'other/checkpoints/step-00000002'}" in said[0]
    prune(tmp_path / "run", keep=1)
    assert (tmp_path / "other/checkpoints/step-00000002/config.json").is_file()
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "other/checkpoints")
    with pytest.raises(CheckpointError, match=r"run/checkpoints: is a link that leads out of the run"):
        minigpt.load(tmp_path / "run")


def test_a_checkpoint_under_another_ones_name_is_not_resumed(tmp_path: Path) -> None:
    run = train(tiny_run(tmp_path))
    (run / "checkpoints/step-00000008").rename(run / "checkpoints/step-00000006")
    with pytest.raises(CheckpointError, match="step-00000006: was saved at step 8; give the folder back its name"):
        train(tiny_run(tmp_path))


def test_an_altered_corpus_is_named_before_training(tmp_path: Path) -> None:
    from minigpt.errors import DataError

    config = tiny_run(tmp_path)
    train(config)
    [shard] = (tmp_path / "data").rglob("train-*.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.bin was altered"):
        train(replace(config, run_name="another"))


@pytest.mark.parametrize("value", ["é漢🙂", "caf\udce9.txt", {"\udcff": ["é", None, 1.5]}])
def test_json_holds_any_text_and_gives_it_back(value: object, tmp_path: Path) -> None:
    record = durable.sealed({"value": value})
    durable.write_text(tmp_path / "a.json", durable.to_json(record))
    again = durable.parse_json(durable.read_text(tmp_path / "a.json"))
    assert again == record
    assert durable.is_intact(again)
    assert durable.parse_json(durable.json_text(value, "ascii")) == value
    assert durable.json_text(value, "ascii").isascii()
    assert durable.canonical_json(value).encode("utf-8")


@pytest.mark.parametrize("field", ["run_name", "runs_dir", "data__source", "sample__prompt"])
def test_what_a_run_could_not_store_is_refused_before_it_starts(field: str, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, **{field: "caf\udce9"})
    with pytest.raises(ConfigError, match=rf"^{field.replace('__', '.')}: 'caf.udce9' is not UTF-8"):
        config.check()
