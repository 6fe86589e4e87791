"""Activation patching of every head at every position: minigpt compared with one whole forward pass per site.

    python benchmarks/patching.py                    6 layers, 6 heads, 384 channels, a prompt of 64 tokens
    python benchmarks/patching.py --at v --tokens 32

The baselines run one forward pass of batch size 1 per site, one after another: with the edit (`slow=True`), and, as a
lower bound for any such method, without an edit. They are measured on a random subset of the sites and scaled to all.
The variants alternate; the table shows medians over the rounds of CPU time, which other programs affect less than wall
time. Weights are random; the times do not depend on them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from minigpt.internals.causal.effect import logit_difference
from minigpt.internals.causal.patching import _by_edits, _places, bind_pair, patch
from minigpt.internals.study import Study
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT
from runs import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--at", default="z")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=65)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sites", type=int, default=50, help="number of sites that the baselines are measured on")
    parser.add_argument("--rounds", type=int, default=5)
    values = parser.parse_args()

    torch.manual_seed(0)
    config = GPTConfig(
        preset=values.preset,
        vocab_size=values.vocabulary,
        block_size=256,
        n_layer=values.layers,
        n_head=values.heads,
        n_embd=values.width,
        zero_init=False,
    )
    study = Study.of(GPT(config))
    clean, corrupted = torch.randint(values.vocabulary, (2, 1, values.tokens))
    metric, by = logit_difference(1, 2), ("layer", "head", "pos")
    ids, other, bound, _ = bind_pair(study, clean, corrupted, metric)
    places, _ = _places(study, ids, other, values.at, by)
    draw = random.Random(0)

    def resumed() -> float:
        patch(study, clean, corrupted, metric, values.at, by)
        return 1.0

    def edited() -> float:
        part = draw.sample(places, min(values.sites, len(places)))
        _by_edits(study, ids, other, bound, values.at, part)
        return len(part) / len(places)

    def plain() -> float:
        count = min(values.sites, len(places))
        with torch.no_grad():
            for _ in range(count):
                study.model(other)
        return count / len(places)

    chosen = sorted(draw.sample(range(len(places)), min(values.sites, len(places))))
    fast = patch(study, clean, corrupted, metric, values.at, by)
    slow = _by_edits(study, ids, other, bound, values.at, [places[i] for i in chosen]).numpy()
    apart = np.abs(fast.values.reshape(-1)[chosen] - (slow - fast.notes["corrupted"])).max()

    sides: dict[str, Callable[[], float]] = {
        "minigpt patch": resumed,
        "an edited forward per site": edited,
        "a plain forward per site": plain,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(values.rounds):
        for name, side in sides.items():
            began = time.process_time()
            share = side()
            times[name].append((time.process_time() - began) / share)
    print(
        f"{len(places):,} sites ({values.at}), {values.layers} layers, {values.heads} heads, {values.width} channels, "
        f"{values.tokens} tokens, {machine('float32')}; greatest difference {apart:.1e} logits\n"
    )
    print(f"{'':26} {'CPU s':>9}   times minigpt's (median, least .. most of {values.rounds} rounds)")
    for name, seconds in times.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, times["minigpt patch"], strict=True)]
        print(
            f"{name:26} {statistics.median(seconds):9.2f}   {statistics.median(ratios):5.2f}"
            f"   ({min(ratios):.2f} .. {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
