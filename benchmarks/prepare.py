"""Preparing a corpus with GPT-2's vocabulary compared with plain tiktoken; reading batches compared with nanoGPT.

    python benchmarks/prepare.py [--megabytes 100] [--runs 3]

The text is Python's help topics and standard library, repeated up to the requested size. `bare tiktoken` is
`Encoding.encode_ordinary_batch` on the same text, split at the same places, with one thread per core; its result is
discarded. `prepare` reads, surveys, splits, encodes, writes, syncs and hashes. The two alternate, and the median
counts. Peak memory is that of a separate process, including torch and the vocabulary. A batch has 32 sequences of 128
tokens; nanoGPT opens the memory map for each batch and stacks one slice per sequence.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from minigpt.data.batches import Batches
from minigpt.data.catalogue import python_topics
from minigpt.data.config import DataConfig
from minigpt.data.encode import GROUP, cut_parts, groups
from minigpt.data.prepare import prepare
from minigpt.data.shards import Corpus
from minigpt.data.survey import Part
from minigpt.tokenizer.bpe import BPETokenizer
from minigpt.tokenizer.build import build_tokenizer
from minigpt.tokenizer.config import TokenizerConfig

GPT2 = TokenizerConfig(kind="gpt2")
ROWS, BLOCK = 32, 128


def write_text(path: Path, size: int) -> None:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join([*python_topics(), *(source.read_text(encoding="utf-8", errors="replace") for source in sources)])
    content = text.encode()
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(content[:size].decode("utf-8", "ignore").encode())
            if size < 4:
                break


def prepare_afresh(source: Path) -> float:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        began = time.perf_counter()
        prepare(DataConfig(source=str(source), folder=folder), GPT2, show=False)
        return time.perf_counter() - began


def encode_barely(texts: list[list[str]], tokenizer: BPETokenizer, cores: int) -> float:
    began = time.perf_counter()
    for group in texts:
        tokenizer._encoding.encode_ordinary_batch(group, num_threads=cores)
    return time.perf_counter() - began


def peak_memory(arguments: list[str]) -> float:
    """Run this script in a separate process; return its peak resident memory in megabytes."""
    command = [sys.executable, __file__, "--peak", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_peak(source: str | None) -> None:
    build_tokenizer(GPT2, show=False)
    if source:
        prepare_afresh(Path(source))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kilobytes / (1024 if sys.platform != "darwin" else 1024**2))


def microseconds(read: Callable[[int], object], steps: int = 2000) -> float:
    times = []
    for step in range(steps):
        began = time.perf_counter()
        read(step)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def nanogpt_batch(corpus: Corpus, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(corpus.train.paths[0], dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - BLOCK, (ROWS,), generator=generator)
    x = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts])
    return x, y


def main(megabytes: float, runs: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tokenizer = build_tokenizer(GPT2, show=False)
    assert isinstance(tokenizer, BPETokenizer)
    with tempfile.TemporaryDirectory() as folder:
        whole, quarter = Path(folder) / "text.txt", Path(folder) / "quarter.txt"
        write_text(whole, int(megabytes * 1e6))
        write_text(quarter, int(megabytes * 1e6 / 4))
        cut = cut_parts([Part("train", whole.read_text(encoding="utf-8"), True, True)], tokenizer.cut)
        texts = [[part.text for part in group] for group in groups(cut, GROUP)]
        bare, ours = [], []
        for _ in range(runs):
            bare.append(encode_barely(texts, tokenizer, cores))
            ours.append(prepare_afresh(whole))
        bare_rate, our_rate = megabytes / statistics.median(bare), megabytes / statistics.median(ours)
        base, small, large = peak_memory([]), peak_memory([str(quarter)]), peak_memory([str(whole)])

        data = DataConfig(source=str(whole), folder=folder)
        corpus = prepare(data, GPT2, show=False)
        began = time.perf_counter()
        prepare(data, GPT2, show=False)
        again = time.perf_counter() - began
        generator = torch.Generator().manual_seed(1)
        shuffled = Batches(corpus.train, BLOCK, ROWS, seed=1)
        drawn = Batches(corpus.train, BLOCK, ROWS, seed=1, order="random")
        theirs = microseconds(lambda step: nanogpt_batch(corpus, generator))
        rows = [
            (f"bare tiktoken, {cores} threads", f"{bare_rate:.1f} MB/s", "1"),
            (f"prepare, {megabytes:g} MB", f"{our_rate:.1f} MB/s", f"{our_rate / bare_rate:.2f}x"),
            (
                "prepare again, nothing changed",
                f"{1e3 * again:.1f} ms",
                f"{again / statistics.median(ours):.1e}x the time",
            ),
            ("peak memory, vocabulary only", f"{base:.0f} MB", "1"),
            (f"peak memory, {megabytes / 4:g} MB of text", f"{small:.0f} MB", f"{small / base:.2f}x"),
            (f"peak memory, {megabytes:g} MB of text", f"{large:.0f} MB", f"{large / base:.2f}x"),
            ("batch, nanoGPT's way", f"{theirs:.0f} us", "1"),
        ]
        for name, batches in (("shuffled", shuffled), ("random", drawn)):
            took = microseconds(batches.read)
            rows.append((f"batch, {name}", f"{took:.0f} us", f"{took / theirs:.2f}x the time"))
        for row in rows:
            print("{:<40}{:>12}   {}".format(*row))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peak", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        report_peak(options.peak[0] if options.peak else None)
    else:
        main(options.megabytes, options.runs)
