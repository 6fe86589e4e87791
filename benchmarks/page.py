"""Size and time of the report page for a model of 10 M parameters (6 layers, 6 heads, 384 channels).

python benchmarks/page.py [--tokens 64 128 256] [--rounds 5]

The weights are random, so attention is as diffuse as at the start of training, which compresses worst. Times are
medians in this process with the model already loaded, next to the time of one plain forward pass of the same text.
"busy" is CPU time, which other programs do not lengthen: with one thread, it is the time of a page on an idle core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from minigpt.internals.study import Study
from minigpt.model.config import GPTConfig
from minigpt.model.gpt import GPT
from minigpt.tokenizer.plain import CharTokenizer
from runs import machine

SIZE, SECONDS = 1.5e6, 3.0  # limits for a page, in bytes and seconds


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of one call."""
    began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = GPTConfig("gpt2", vocab_size=65, block_size=max(given.tokens), n_layer=6, n_head=6, n_embd=384)
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(0)
    model.reset_parameters(generator)
    study = Study.of(model, CharTokenizer([chr(48 + i) for i in range(65)]))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {machine('float32')}")
    print(f"{'tokens':>8}{'page':>12}{'of 1.5 MB':>11}{'seconds':>10}{'of 3 s':>8}{'busy':>8}{'forwards':>10}")
    for tokens in given.tokens:
        ids = torch.randint(65, (1, tokens), generator=generator)
        size = len(study.report(ids).html().encode())
        times: dict[str, list[tuple[float, float]]] = {"page": [], "forward": []}
        for _ in range(given.rounds):
            times["page"].append(seconds(lambda: study.report(ids).html()))  # noqa: B023 - called at once
            with torch.no_grad():
                times["forward"].append(seconds(lambda: model(ids)))  # noqa: B023
        page, forward = (tuple(map(statistics.median, zip(*each, strict=True))) for each in times.values())
        shares = f"{size / 1e3:>10.0f}kB{size / SIZE:>11.0%}{page[0]:>10.2f}{page[0] / SECONDS:>8.0%}"
        print(f"{tokens:>8}{shares}{page[1]:>8.2f}{page[1] / forward[1]:>10.0f}")


if __name__ == "__main__":
    main()
