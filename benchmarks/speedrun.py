"""Time to a target loss: configs/speedrun.yaml against nanoGPT's CPU recipe, on character-level tinyshakespeare.

    python benchmarks/speedrun.py --file input.txt                  baseline, sprint and budget, three seeds each
    python benchmarks/speedrun.py --file input.txt --rows best      configs/shakespeare_best.yaml
    python benchmarks/speedrun.py --file input.txt --picture curves.svg

    baseline   nanoGPT's CPU recipe (configs/nanogpt_cpu.yaml): 2,000 steps and one validation, in a plain PyTorch loop
    sprint     configs/speedrun.yaml with a schedule that ends at a loss of 1.88, about the baseline's final loss
    budget     configs/speedrun.yaml with as many steps as fit into the baseline's time
    best       configs/shakespeare_best.yaml: several epochs with dropout, weight decay, averaging and early stopping

The loss is the mean over the whole validation split, in adjacent windows of block_size tokens. Time counts from the
first step and includes compilation (with an empty cache) and all validations; start-up time is shown separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from draw import Points, curves, smooth
from minigpt.data.batches import Batches, validation_windows
from minigpt.data.shards import open_corpus
from minigpt.evaluation.loss import evaluate
from minigpt.model.gpt import GPT
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.loss import next_token_loss
from minigpt.training.recipe.schedule import learning_rate
from minigpt.training.run.settle import settle
from runs import ROOT, Outcome, machine, run

TARGET = 1.88  # nats per character
SPRINT_STEPS = 90
MARGIN = 0.97  # fraction of the baseline's time that the budget row is planned for
SMOOTHED = 0.03  # width of the running mean in the picture, as a fraction of the baseline's time
HIGHEST = 2.6  # top of the loss axis in the picture; a new model's loss is 4.2


def baseline(text: Path, seed: int) -> dict[str, Any]:
    """Train nanoGPT's recipe in a plain PyTorch loop; return seconds, final loss, and the training losses."""
    values = yaml.safe_load((ROOT / "configs/nanogpt_cpu.yaml").read_text())
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        values["data"] |= {"source": str(text), "folder": f"{folder}/data"}
        job = settle(TrainConfig.from_dict({**values, "run_name": "run", "runs_dir": folder, "seed": seed}), held)
        config, corpus = job.config, open_corpus(job.corpus)
        batches = Batches(corpus.train, config.model.block_size, config.batch_size, seed, config.data.order)
        torch.manual_seed(seed)
        model = GPT(config.model).train()
        settings = config.optimizer
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            betas=(settings.beta1, settings.beta2),
        )
        training: list[tuple[float, float]] = []
        began = time.perf_counter()
        for step in range(config.trainer.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, config.trainer.max_steps)
            ids, targets = batches.read(step)
            loss = next_token_loss(model, ids, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip_val)
            optimizer.step()
            if step % 10 == 9:
                training.append((time.perf_counter() - began, float(loss.detach())))
        windows = validation_windows(corpus.val, config.model.block_size)
        loss = evaluate(model, windows, torch.ones(corpus.tokenizer.vocab_size, dtype=torch.int64)).loss
        return {"seconds": time.perf_counter() - began, "loss": loss, "training": training}


def median(values: list[float]) -> str:
    """Format the median with its range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def report(name: str, outcomes: list[Outcome], target: float) -> None:
    """Print one row: medians over the seeds."""
    reached = [outcome.seconds_to(target) for outcome in outcomes]
    print(
        f"{name:9} {outcomes[0].steps:6} steps of {1000 * statistics.median(o.step_seconds for o in outcomes):.0f} ms, "
        f"{median([o.seconds for o in outcomes])} s, lowest loss {median([o.best for o in outcomes])}, "
        f"at or below {target} after {median(reached)} s, start-up {median([o.start_up for o in outcomes])} s",
        flush=True,
    )


def main() -> None:
    """Print the table; draw the curves if --picture is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--rows", default="baseline,sprint,budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", help="SVG file to write, with the curves of the last seed")
    parser.add_argument("--baseline", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    text = Path(arguments.file).resolve()
    if arguments.baseline is not None:
        print(json.dumps(baseline(text, arguments.baseline)))
        return
    rows, seeds = arguments.rows.split(","), range(1, arguments.seeds + 1)
    times: list[float] = []
    losses: list[float] = []
    lines: dict[str, Points] = {}
    marks: dict[str, Points] = {}
    outcomes: dict[str, list[Outcome]] = {row: [] for row in rows if row != "baseline"}
    for seed in seeds:  # all rows per seed, so that a drift of the machine affects them equally
        if "baseline" in rows:
            command = [sys.executable, __file__, "--file", str(text), "--baseline", str(seed)]
            result = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            times.append(result["seconds"])
            losses.append(result["loss"])
            lines["nanoGPT's CPU recipe"] = smooth(result["training"], SMOOTHED * times[-1])
            marks["nanoGPT's CPU recipe"] = [(times[-1], losses[-1])]
        for row in outcomes:
            flags = ["--seed", str(seed)]
            if row == "sprint":
                flags += ["--trainer.max_steps", str(SPRINT_STEPS), "--eval.every", "0"]
            if row == "budget":
                step = outcomes["sprint"][-1].step_seconds
                flags += ["--trainer.max_steps", str(int(MARGIN * times[-1] / step)), "--eval.every", "0"]
            done = run("shakespeare_best" if row == "best" else "speedrun", text, *flags)
            outcomes[row].append(done)
            lines[row] = smooth(done.training, SMOOTHED * (times[-1] if times else done.seconds))
            marks[row] = [(seconds, loss) for _, seconds, loss in done.curve]
    precisions = {each.precision for done in outcomes.values() for each in done}
    print(f"{machine(' and '.join(sorted(precisions)) or 'float32')}; the baseline in float32")
    if times:
        print(f"baseline    2000 steps, {median(times)} s, loss {median(losses)}")
    for row, done in outcomes.items():
        report(row, done, TARGET if row != "best" else 1.47)
        if row == "sprint" and times:
            ratios = [seconds / o.seconds_to(TARGET) for seconds, o in zip(times, done, strict=True)]
            print(f"          the baseline takes {median(ratios)} times as long")
    if arguments.picture:
        title = "Training loss, and validation loss (dots), on tinyshakespeare by character"
        lines = {name: [point for point in line if point[1] < HIGHEST] for name, line in lines.items()}
        Path(arguments.picture).write_text(
            curves(title, lines, marks, "seconds on two CPU cores", "nats per character")
        )


if __name__ == "__main__":
    main()
