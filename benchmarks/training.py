"""What a training step costs through minigpt and Lightning, against the same step in a plain PyTorch loop.

    python benchmarks/training.py                 the nanoGPT CPU recipe on a text that is made up
    python benchmarks/training.py --file TEXT     on a text of yours

Both sides train the same model on the same batches with the same optimizer, in turn, in one process. minigpt's side has
everything on that a run has: metrics, the progress line, the finite check, the learning rate schedule.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from minigpt.arguments import shipped
from minigpt.data.batches import Batches
from minigpt.data.shards import open_corpus
from minigpt.model.gpt import GPT
from minigpt.training.config import TrainConfig
from minigpt.training.fit import fit
from minigpt.training.metrics import read_metrics
from minigpt.training.module import next_token_loss
from minigpt.training.optimizer import make_optimizer
from minigpt.training.schedule import learning_rate
from minigpt.training.settle import Job, settle

WARM = 20  # steps at the start that do not count


def plain_loop(job: Job) -> float:
    """Seconds a step of the loop that one would write by hand."""
    config = job.config
    corpus = open_corpus(job.corpus)
    batches = Batches(corpus.train, config.model.block_size, config.batch_size, config.seed, config.data.order)
    torch.manual_seed(config.seed)
    model = GPT(config.model).train()
    optimizer = make_optimizer(model, config.optimizer)
    for step in range(config.trainer.max_steps):
        if step == WARM:
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.trainer.max_steps)
        ids, targets = batches.read(step)
        loss = next_token_loss(model, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
    return (time.perf_counter() - began) / (config.trainer.max_steps - WARM)


def through_minigpt(job: Job) -> float:
    """Seconds a step of `fit`, read off its own metrics."""
    fit(job)
    rows = [row for row in read_metrics(job.run / "metrics.jsonl") if "train/loss" in row]
    first = next(row for row in rows if row["step"] == WARM)
    return (rows[-1]["seconds"] - first["seconds"]) / (rows[-1]["step"] - WARM)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nanogpt_cpu")
    parser.add_argument("--file", help="text to train on")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = shipped(arguments.config) or Path(arguments.config)
    values = yaml.safe_load(path.read_text())
    times: dict[str, list[float]] = {"plain PyTorch loop": [], "minigpt through Lightning": []}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(arguments.file) if arguments.file else Path(folder) / "text.txt"
        if not arguments.file:
            draw = random.Random(0)
            text.write_text("".join(draw.choices("abcdefghijklmnopqrstuvwxyz ,.\n", k=300_000)))
        values["data"] = {**values.get("data", {}), "source": str(text), "folder": folder}
        config = TrainConfig.from_dict({**values, "runs_dir": folder})
        config = replace(
            config,
            trainer=replace(config.trainer, max_steps=arguments.steps),
            checkpoint=replace(config.checkpoint, every=10**9),
            eval=replace(config.eval, every=0),
            sample=replace(config.sample, max_new_tokens=0),
        )
        for number in range(arguments.rounds):
            job = settle(replace(config, run_name=f"round-{number}"), ExitStack())
            sides = [("minigpt through Lightning", through_minigpt), ("plain PyTorch loop", plain_loop)]
            for name, measure in sides if number % 2 else reversed(sides):
                times[name].append(measure(job))
    ratios = [a / b for a, b in zip(times["minigpt through Lightning"], times["plain PyTorch loop"], strict=True)]
    print(
        f"\n{path.name}: {arguments.steps} steps, {arguments.rounds} alternating rounds, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':28}{'median':>10}{'min':>10}{'max':>10}")
    for name, seconds in times.items():
        print(f"{name:28}" + "".join(f"{1000 * f(seconds):8.2f}ms" for f in (statistics.median, min, max)))
    print(f"{'ratio, round by round':28}" + "".join(f"{f(ratios):10.3f}" for f in (statistics.median, min, max)))


if __name__ == "__main__":
    main()
