"""The time of a training step with minigpt and Lightning, compared with the same step in a plain PyTorch loop.

    python benchmarks/training.py                      nanoGPT's CPU recipe on generated text
    python benchmarks/training.py --config speedrun    any config, with its optimizer, averaging, precision, compilation
    python benchmarks/training.py --file TEXT          on your own text

Both train the same model on the same batches with the same optimizer, alternating every ten steps, in one process.
minigpt runs with everything a normal run has: metrics, progress line, check for NaN, learning-rate schedule.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from minigpt.cli.arguments import shipped
from minigpt.data.batches import Batches
from minigpt.model.gpt import GPT
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.average import Average
from minigpt.training.recipe.loss import Objective, compiled
from minigpt.training.recipe.optimizer import make_optimizer
from minigpt.training.recipe.schedule import learning_rate
from minigpt.training.run import fit as fit_module
from minigpt.training.run.loader import MicroBatches
from minigpt.training.run.settle import settle
from runs import machine

TURN = 10  # steps measured per turn; one more step before them is not, because the caches hold the other loop's data
WARM = 2  # turns of each loop at the start that are not measured


class PlainLoop:
    """A plain PyTorch training loop."""

    def __init__(self, config: TrainConfig, batches: Batches) -> None:
        self.config, self.batches, self.done = config, batches, 0
        torch.manual_seed(config.seed)
        self.model = GPT(config.model).train()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        decay = config.optimizer.ema_decay
        self.average = Average(self.model, decay) if decay else None
        self.objective = compiled(Objective()) if config.trainer.compile else Objective()

    def step(self) -> None:
        """One optimizer step."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(config.optimizer, self.done, config.trainer.max_steps)
        self.optimizer.zero_grad()
        for micro in range(config.accumulation):
            rows = slice(micro * config.micro_batch_size, (micro + 1) * config.micro_batch_size)
            ids, targets = self.batches.read(self.done, rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
                loss = self.objective(self.model, ids, targets).total
            (loss / config.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.trainer.gradient_clip_val or float("inf"))
        self.optimizer.step()
        if self.average:
            self.average.update()
        self.done += 1


class TakingTurns(MicroBatches):
    """minigpt's loader; it runs the plain loop's steps after every turn of Lightning's."""

    times: tuple[list[float], list[float]] = ([], [])  # seconds per step: minigpt's turns, the plain loop's

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plain, began = PlainLoop(self.config, self.batches), 0.0
        for number, batch in enumerate(super().__iter__()):
            step, micro = divmod(number, self.accumulation)
            place = step % (TURN + 1)
            if micro == 0 and place == 0 and step:
                self.times[0].append((time.perf_counter() - began) / TURN)
                plain.step()
                began = time.perf_counter()
                for _ in range(TURN):
                    plain.step()
                self.times[1].append((time.perf_counter() - began) / TURN)
            if micro == 0 and place == 1:
                began = time.perf_counter()
            yield batch


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nanogpt_cpu")
    parser.add_argument("--file", help="text to train on")
    parser.add_argument("--turns", type=int, default=40, help="measured turns of each loop")
    parser.add_argument("--compile", choices=("yes", "no"), help="override the config's compile setting")
    arguments = parser.parse_args()
    path = shipped(arguments.config) or Path(arguments.config)
    values = yaml.safe_load(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        text = Path(arguments.file) if arguments.file else Path(folder) / "text.txt"
        if not arguments.file:
            draw = random.Random(0)
            text.write_text("".join(draw.choices("abcdefghijklmnopqrstuvwxyz ,.\n", k=300_000)))
        values["data"] = {**values.get("data", {}), "source": str(text), "folder": folder}
        config = TrainConfig.from_dict({**values, "runs_dir": folder, "run_name": "run", "minutes": None})
        changes = {"compile": arguments.compile == "yes"} if arguments.compile else {}
        steps = (TURN + 1) * (arguments.turns + WARM) + 1
        config = replace(
            config,
            trainer=replace(config.trainer, max_steps=steps, devices=1, accelerator="cpu", **changes),
            checkpoint=replace(config.checkpoint, every=10**9),
            eval=replace(config.eval, every=0, tokens=1),
            sample=replace(config.sample, every=0, max_new_tokens=0),
        )
        fit_module.MicroBatches = TakingTurns  # type: ignore[misc]
        with ExitStack() as held:
            job = settle(config, held)
            precision = job.config.trainer.precision
            fit_module.fit(job)
    ours, plain = (times[WARM:] for times in TakingTurns.times)
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(
        f"\n{path.name}: {len(ratios)} turns of {TURN} steps on each side, {machine(precision)}, "
        f"median step and quartiles"
    )
    for name, numbers in (("plain PyTorch loop", plain), ("minigpt through Lightning", ours)):
        print(f"{name:28}" + "".join(f"{1000 * quartile:9.2f} ms" for quartile in in_the_middle(numbers)))
    print(f"{'ratio, turn by turn':28}" + "".join(f"{quartile:12.3f}" for quartile in in_the_middle(ratios)))
    print(f"{'ratio of all time':28}{sum(ours) / sum(plain):12.3f}")


def in_the_middle(numbers: list[float]) -> tuple[float, float, float]:
    """Return median, first and third quartile."""
    first, median, third = statistics.quantiles(numbers, n=4)
    return median, first, third


if __name__ == "__main__":
    main()
