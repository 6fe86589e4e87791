"""`--minutes`: a short probe measures the run, and sets its number of steps once.

The probe trains the same job with the same number of processes in a temporary folder. It runs twice. The first probe
fills the compiler's cache and gives a rough time per step. The second starts under the conditions of the real run, so
that its start-up time (processes, model, compilation from the cache) is the same.
"""

from __future__ import annotations

import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minigpt.checkpoint.pruning import make_ready
from minigpt.data.batches import validation_windows
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, MemoryExceeded, MinigptError, NotLearning
from minigpt.model.cost import cost_of
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.plan.hardware import peak_flops
from minigpt.training.run.job import Job
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.standing import Standing

FIRST_STEPS = 3  # steps of the first probe: the first one compiles, the other two are timed
MOST_STEPS = 400  # maximum steps of the second probe
ALLOWANCE = 20.0  # seconds for the second probe, or SHARE of the budget if that is less
SHARE = 0.05
# Runs shorter than this (seconds) are not compiled: compiling takes a minute or more on a CPU and a quarter of a minute
# on a GPU, and a run must last several times as long (see WORTH) to benefit.
SHORT, SHORT_ON_GPU = 300.0, 60.0
LEAST_UTILISATION = 0.3  # fraction of the peak of matrix products that training on a CPU reaches
COMPARED, COMPARED_ON_GPU = 5.0, 1.0  # seconds for each of the two probes that compare compiled and eager steps
WORTH = 5.0  # a run is compiled only if it lasts at least this many times the compilation time


@dataclass(frozen=True)
class Timing:
    """Seconds of each part of a job, measured by a probe."""

    step: float
    """One optimizer step."""
    start: float
    """Start-up, with compilation from the cache."""
    cold_start: float
    """Start-up, with compilation from scratch."""
    validation: float
    """Time of one validation."""
    save: float
    """Time to save one checkpoint."""
    sample: float
    """Time of one sample."""


def measure(
    job: Job, probe: Callable[[Job], None], *, compile: bool | None = None, allowance: float = ALLOWANCE
) -> Timing:
    """Measure the times of a job with two short probes.

    Args:
        job: the job to time; its folder must exist.
        probe: trains a job to its end, in as many processes as the real run.
        compile: whether to compile the step; None: as in the config.
        allowance: about how many seconds the second probe may take, without its start-up.
    """
    config = job.config
    if compile is not None:
        config = replace(config, trainer=replace(config.trainer, compile=compile))
    windows = None
    corpus = open_corpus(job.corpus)
    if len(corpus.val) > 1:
        windows = validation_windows(corpus.val, config.model.block_size, config.eval.tokens)

    first = replace(config, sample=replace(config.sample, max_new_tokens=0))
    cold_start, step, _ = _probe(job, probe, first, FIRST_STEPS, 1, tokens=1)

    steps = max(FIRST_STEPS, min(MOST_STEPS, int(allowance / 2 / step)))
    tokens, part = 1, 1.0
    if windows is not None:
        forward = step / 3 * windows.tokens / config.batch.tokens  # approximate seconds of a whole validation
        tokens = max(config.model.block_size, int(windows.tokens * min(1.0, allowance / 4 / forward)))
        part = validation_windows(corpus.val, config.model.block_size, tokens).tokens / windows.tokens
    rows = max(1, min(config.trainer.log_every_n_steps, steps // 8))
    start, step, spent = _probe(job, probe, config, steps, rows, tokens)
    validation = spent["validation"] / part if windows is not None else 0.0
    return Timing(step, start, cold_start, validation, spent["save"], spent["sample"])


def _probe(
    job: Job, probe: Callable[[Job], None], config: TrainConfig, steps: int, rows: int, tokens: int
) -> tuple[float, float, dict[str, float]]:
    """Train a few steps, then validate, save and sample once.

    Returns:
        Seconds of start-up, seconds of one step, and seconds of "validation", "save" and "sample".
    """
    folder = job.run / ".probe"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    make_ready(folder)
    never = 10**9
    config = replace(
        config,
        log="none",
        trainer=replace(config.trainer, max_steps=steps, log_every_n_steps=rows),
        checkpoint=replace(config.checkpoint, every=never),
        eval=replace(config.eval, every=0, tokens=tokens, patience=0),
        sample=replace(config.sample, every=0),
    )
    began = time.monotonic()
    try:
        probe(Job(config, folder, job.corpus, start=None, first_step=0, owed=(), standing=Standing(), probe=True))
        took = time.monotonic() - began
        row = read_metrics(folder / "metrics.jsonl")[-1]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spent = {what: row[f"time/{what}"] for what in ("validation", "save", "sample")}
    once = max(0.0, took - steps * row["time/step"] - sum(spent.values()))
    return once, row["time/step"], spent


def times_due(steps: int, *every: int) -> int:
    """Count the steps from 1 to `steps` that are the last step or a multiple of one of `every` (0: no multiples).

    Counts the steps for which each_step.due is true.
    """
    intervals = [interval for interval in every if interval > 0]
    if not intervals or not steps:
        return min(1, steps)
    single = sum(steps // interval for interval in intervals)
    both = steps // math.lcm(*intervals) if len(intervals) == 2 else 0
    return single - both + all(steps % interval for interval in intervals)


def seconds_of(config: TrainConfig, timing: Timing, steps: int) -> float:
    """Seconds that a run of `steps` steps takes from start to end."""
    return (
        timing.start
        + steps * timing.step
        + times_due(steps, config.eval.every) * timing.validation
        + times_due(steps, config.checkpoint.every, config.eval.every)
        * timing.save  # each validation may be a new best
        + times_due(steps, config.sample.every) * timing.sample
    )


def steps_within(config: TrainConfig, timing: Timing, seconds: float) -> int:
    """The largest number of steps whose run ends within `seconds`; 0 if not even one step fits."""
    most = max(0, int(seconds / timing.step)) + 1
    return bisect_right(range(1, most + 1), seconds, key=lambda steps: seconds_of(config, timing, steps))


def compilation_pays(plain: Timing, compiled: Timing, steps: int) -> bool:
    """Whether to compile a run: it must save more time than compilation costs and last WORTH times as long.

    Args:
        plain: result of measure(..., compile=False).
        compiled: result of measure(..., compile=True).
        steps: number of steps of the run.
    """
    cost = max(0.0, compiled.cold_start - plain.cold_start)
    return steps * (plain.step - compiled.step) > cost and steps * plain.step > WORTH * cost


def decide_compilation(job: Job, probe: Callable[[Job], None]) -> TrainConfig:
    """Return the job's config with trainer.compile set, and print the reason.

    A short run is not compiled. For a longer run, probes measure what compilation costs and saves. On a CPU the length
    of the run is estimated from its FLOPs. On a GPU a short probe measures it, since launching a small model's kernels
    takes longer than computing them.
    """
    config = job.config
    trainer = config.trainer
    on_gpu = trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    plain: Timing | None = None
    if config.minutes is not None:
        most = 60 * config.minutes
    elif on_gpu:
        plain = measure(job, probe, compile=False, allowance=COMPARED_ON_GPU)
        most = trainer.max_steps * plain.step
    else:
        flops = cost_of(config.model).training_flops * config.batch.tokens / config.processes
        most = trainer.max_steps * flops / (peak_flops(torch.device("cpu"), "32-true") * LEAST_UTILISATION)
    if most < (SHORT_ON_GPU if on_gpu else SHORT):
        compiled, why = False, f"a run of at most {most:.0f} s is too short to benefit"
    else:
        allowance = COMPARED_ON_GPU if on_gpu else COMPARED
        plain = plain or measure(job, probe, compile=False, allowance=allowance)
        try:
            quick = measure(job, probe, compile=True, allowance=allowance)
        except MinigptError as error:  # the eager step works: train without compilation
            if error.exit_code not in (NotLearning.exit_code, MemoryExceeded.exit_code):
                raise
            compiled, why = False, f"the compiled step does not train ({error})"
        else:
            steps = int(most / plain.step) if config.minutes is not None else trainer.max_steps
            compiled = compilation_pays(plain, quick, steps)
            cold = max(0.0, quick.cold_start - plain.cold_start)
            why = f"a step takes {quick.step:.3g} s compiled, {plain.step:.3g} s eager; compilation takes {cold:.0f} s"
    notice(f"{'compiled' if compiled else 'not compiled'}: {why}")
    return replace(config, trainer=replace(trainer, compile=compiled))


def plan(job: Job, probe: Callable[[Job], None]) -> TrainConfig:
    """Return the config of a new job with what a probe decides: trainer.compile, and trainer.max_steps from minutes."""
    began = time.monotonic()
    config = job.config
    if config.trainer.compile is None:
        config = decide_compilation(job, probe)
    if config.minutes is not None:
        config = plan_steps(replace(job, config=config), probe, time.monotonic() - began)
    return config


def plan_steps(job: Job, probe: Callable[[Job], None], spent_before: float = 0.0) -> TrainConfig:
    """Return the job's config with the max_steps that fit its minutes, and print how they were derived.

    The time of the probe counts as part of the budget.

    Args:
        job: a job with config.minutes set.
        probe: see measure.
        spent_before: seconds of the budget already spent.

    Raises:
        ConfigError: the budget is too short for one step.
    """
    config, began = job.config, time.monotonic() - spent_before
    assert config.minutes is not None
    budget = 60 * config.minutes
    timing = measure(job, probe, allowance=min(ALLOWANCE, SHARE * budget))
    spent = time.monotonic() - began
    steps = steps_within(config, timing, budget - spent)
    if not steps:
        needed = spent + seconds_of(config, timing, 1)
        raise ConfigError(
            f"minutes: {config.minutes:g} is too short for one step: the probe took {spent:.0f} s, and start-up, one "
            f"step and the work after the last step take {needed - spent:.0f} s; give at least "
            f"{math.ceil(needed / 6) / 10:g}"
        )
    parts = [f"probe {spent:.0f} s", f"start {timing.start:.1f} s"]
    for count, what in (
        (times_due(steps, config.eval.every), "validation"),
        (times_due(steps, config.checkpoint.every, config.eval.every), "save"),
        (times_due(steps, config.sample.every), "sample"),
    ):
        if seconds := getattr(timing, what):
            parts.append(f"{count:,} {what}{'s' if count > 1 else ''} of {seconds:.2g} s")
    notice(f"{config.minutes:g} minutes: {steps:,} steps of {timing.step:.3g} s ({', '.join(parts)})")
    return replace(config, trainer=replace(config.trainer, max_steps=steps))


def report(job: Job) -> None:
    """Print the planned and the actual time of a finished run; nothing if the run had no time budget."""
    rows = read_metrics(job.run / "metrics.jsonl")
    if job.config.minutes is None or not rows:
        return
    ends = [row for row in rows if "time/training" in row]
    spent = {what: sum(row[f"time/{what}"] for row in ends) for what in ("validation", "save", "sample")}
    apart = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in spent.items() if seconds)
    notice(
        f"planned for {job.config.minutes:g} minutes, including probe and start: {rows[-1]['step']:,} steps took "
        f"{max(row['seconds'] for row in rows) / 60:.2f} minutes{f' ({apart})' if apart else ''}"
    )
