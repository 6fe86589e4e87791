"""Fault-injection trials on disks: power cuts, full and read-only file systems, limits, bit flips, truncated files."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch

from fault_trials import Outcome, busy_config, in_child, outcome, refused, save, watching
from minigpt.checkpoint import saving
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.runs import newest_valid, step_of
from minigpt.data.prepare import prepare
from minigpt.data.shards import open_corpus
from minigpt.durable import sync
from minigpt.errors import DiskError
from minigpt.training.launch import train

# Power cuts.


class Shadow:
    """The state of a folder after a power failure: file contents and folder entries as of their last fsync.

    Files and folders are kept open, so that the file system does not reuse their inode numbers.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.held: list[int] = []
        for path in [root, *root.rglob("*")]:
            self.synced(os.open(path, os.O_RDONLY))

    def synced(self, descriptor: int) -> None:
        """Record that this file or folder is now on the disk."""
        number = os.fstat(descriptor).st_ino
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.held.append(os.dup(descriptor))
        if path.is_dir():
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(path)]
            self.names[number] = {name: (s.st_ino, stat.S_ISDIR(s.st_mode)) for name, s in found}
        else:
            self.content[number] = path.read_bytes()

    def after_power_cut(self, to: Path, names_are_safe: bool) -> None:
        """Write the folder as it would be after the power failure.

        Args:
            to: target folder.
            names_are_safe: new names and renames reach the disk immediately; only file contents can be lost.
        """
        self._restore(os.stat(self.root).st_ino, self.root, to, names_are_safe)

    def _restore(self, number: int, path: Path, to: Path, names_are_safe: bool) -> None:
        to.mkdir()
        names = self.names.get(number, {})
        if names_are_safe:
            names = {each.name: (each.stat().st_ino, each.is_dir()) for each in path.iterdir()}
        for name, (child, is_folder) in names.items():
            if is_folder:
                self._restore(child, path / name, to / name, names_are_safe)
            else:
                (to / name).write_bytes(self.content.get(child, b""))

    def close(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)


def power_cuts(folder: Path) -> tuple[int, list[str]]:
    """Simulate a power failure before and after each call of a save and prune. Returns (trials, errors)."""
    run, found = folder / "run", folder / "found"
    for step in (1, 2):
        save(run, step)
    sync(run)
    shadow, trials, wrong = Shadow(run), 0, []

    def cut(when: str, allowed: tuple[str, ...]) -> None:
        nonlocal trials
        for names_are_safe in (False, True):
            trials += 1
            shadow.after_power_cut(found, names_are_safe)
            newest = newest_valid(found)
            if newest is None or newest.name not in allowed:
                wrong.append(f"power cut {when} (names safe: {names_are_safe}): the newest is {newest}")
            shutil.rmtree(found)

    inside = False

    def watcher(event: str, details: tuple) -> None:
        nonlocal inside
        if inside:
            return
        inside = True  # the trial's own calls must not be counted
        cut(f"before call {trials // 2} ({event})", ("step-00000002", "step-00000003"))
        if event == "fsync":
            shadow.synced(details[0])
        inside = False

    with watching(watcher):
        save(run, 3)
    cut("after the save", ("step-00000003",))
    shadow.close()
    return trials, wrong


# Full disks.

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 16384, 1 << 18


def _system_call(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "unshare or mount is not permitted")


def mount_tmpfs(folder: Path, size: int, *, again: bool = False, read_only: bool = False) -> None:
    """Mount a file system of this many bytes on `folder`, visible to this process only. OSError if not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not again:
        _system_call(libc.unshare(CLONE_NEWNS))
        _system_call(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    flags = (MS_REMOUNT if again else 0) | (MS_RDONLY if read_only else 0)
    options = b"" if read_only else f"size={size}".encode()
    _system_call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options))


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    return in_child(lambda: mount_tmpfs(folder, 1 << 20)) == 0


def small_disk(folder: Path, size: int) -> str:
    """Save three times on a disk of `size` bytes, in a child process. Returns "full", "fits", or an error."""

    def work() -> None:
        mount_tmpfs(folder, size)
        saving.check_space = lambda path, needed: None  # otherwise the save would refuse to start
        os._exit(_three_saves(folder / "run"))

    return _ENDS.get(in_child(work), "a crash")


def small_files(folder: Path, size: int) -> str:
    """Save three times, the last two with a file size limit of `size` bytes. Returns "full", "fits", or an error."""

    def work() -> None:
        save(folder / "run", 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os._exit(_three_saves(folder / "run", first=2))

    code = in_child(work)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return _ENDS.get(code, "a crash")


_ENDS = {10: "fits", 11: "full", 12: "the last good checkpoint was lost", 13: "something was left behind"}


def _three_saves(run: Path, first: int = 1) -> int:
    good, full = first - 1, False
    for step in range(first, 4):
        try:
            save(run, step)
            good = step
        except DiskError:
            full = True
    newest = newest_valid(run)
    # A save may succeed although best.json, written after it, does not fit any more.
    if good and (newest is None or step_of(newest) < good):
        return 12
    if (run / "checkpoints").is_dir() and list((run / "checkpoints").glob(".*")):
        return 13
    return 11 if full else 10


def full_disk_run(folder: Path, size: int, expected: Outcome) -> list[str]:
    """Train on a disk of `size` bytes until it is full, enlarge the disk and resume. Returns errors."""
    wrong = {3: "no DiskError", 4: "a temporary folder was left", 5: "the run that went on differs"}

    def work() -> None:
        (folder / "runs").mkdir()
        mount_tmpfs(folder / "runs", size)
        config = busy_config(folder, "full")
        try:
            train(config)
            os._exit(3)
        except DiskError:
            pass
        mount_tmpfs(folder / "runs", 1 << 26, again=True)
        run = train(config)
        if list((run / "checkpoints").glob(".tmp*")):
            os._exit(4)
        os._exit(5 if outcome(run).differences(expected) else 0)

    code = in_child(work)
    return [] if code == 0 else [f"disk of {size} bytes: {wrong.get(code, f'exit code {code}')}"]


# Flipped bits and truncated files.


def damages(content: bytes, flips: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield (description, damaged content): random bit flips, and truncations to 0, 1, half and nearly all bytes.

    A line feed at the end does not count as content.
    """
    for _ in range(flips):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        yield f"bit {bit} of byte {place}", content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
    for length in sorted({0, 1, len(content) // 2, len(content.rstrip(b"\n")) - 1} - {len(content)}):
        yield f"cut to {length} bytes", content[:length]


def damage_files(files: list[Path], flips: int, notices: Callable[[], bool], seed: int = 0) -> tuple[int, list[str]]:
    """Damage one file at a time, by `flips` bit flips and by truncation. Returns (trials, undetected damage)."""
    draw, trials, missed = random.Random(seed), 0, []
    for file in files:
        whole, times = file.read_bytes(), file.stat()
        for what, content in damages(whole, flips, draw):
            trials += 1
            file.write_bytes(content)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            if not notices():
                missed.append(f"{file.name}: {what}")
        file.write_bytes(whole)
    return trials, missed


def checkpoint_damage(folder: Path, flips: int) -> dict[str, tuple[int, list[str]]]:
    """Damage every file of a checkpoint; also count what other readers detect of the same damage in the weights."""
    save(folder / "run", 1)
    whole = folder / "run/checkpoints/step-00000001"
    files = sorted(whole.iterdir())
    every = max(1, flips // len(files))
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    plain, pickled = folder / "plain.safetensors", folder / "pickled.pt"
    safetensors.torch.save_file(tensors, plain)
    torch.save(tensors, pickled)
    return {
        "a checkpoint's files, verified": damage_files(files, every, lambda: refused(lambda: verify(whole))),
        "control: safetensors.torch.load_file": damage_files(
            [plain], every, lambda: refused(lambda: safetensors.torch.load_file(plain))
        ),
        "control: torch.load(weights_only=True)": damage_files(
            [pickled], every, lambda: refused(lambda: torch.load(pickled, weights_only=True))
        ),
    }


def corpus_damage(folder: Path, flips: int) -> tuple[int, list[str]]:
    """Damage every file of a prepared corpus."""
    prepare(busy_config(folder, "corpus").data, busy_config(folder, "corpus").tokenizer)
    corpus = next((folder / "data").rglob("manifest.json")).parent

    def opened() -> None:
        found = open_corpus(corpus)
        found.verify()
        assert found.tokenizer.vocab_size

    files = sorted(corpus.iterdir())
    return damage_files(files, max(1, flips // len(files)), lambda: refused(opened))
