"""Time budgets: a short probe of the job measures its speed, and `minutes` sets the number of steps from it, once.

A probe is a short run of the same job with the same number of processes, in a temporary folder. It runs twice. The
first probe fills the compiler's cache and gives a rough step time. The second finds the same conditions as the real
run, so its one-time costs (starting processes, building the model, compiling from the cache) are those of the real run.
"""

from __future__ import annotations

import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minigpt.checkpoint.runs import make_ready
from minigpt.data.batches import validation_windows
from minigpt.data.shards import open_corpus
from minigpt.errors import ConfigError, MemoryExceeded, MinigptError, NotLearning
from minigpt.model.cost import cost_of
from minigpt.terminal import notice
from minigpt.training.config import TrainConfig
from minigpt.training.plan.hardware import peak_flops
from minigpt.training.run.metrics import read_metrics
from minigpt.training.run.settle import Job
from minigpt.training.run.standing import Standing

FIRST_STEPS = 3  # steps of the first probe: one that compiles, two that are timed
MOST_STEPS = 400  # maximum number of steps of the second probe
ALLOWANCE = 20.0  # seconds for the second probe, or SHARE of the budget if that is less
SHARE = 0.05
# Seconds. Shorter runs are not compiled: compiling takes a minute or more on a CPU, a quarter of a minute on a GPU, and
# a run must last about five times as long.
SHORT, SHORT_ON_GPU = 300.0, 60.0
LEAST_UTILISATION = 0.3  # lower bound of the fraction of peak FLOP/s that training on a CPU reaches
COMPARED, COMPARED_ON_GPU = 5.0, 1.0  # seconds for each of the two probes that compare compiled and uncompiled steps
WORTH = 5.0  # a run is compiled only if it lasts this many times the cost of compiling


@dataclass(frozen=True)
class Timing:
    """Measured times of the parts of a job, in seconds."""

    step: float
    """Time of one step."""
    start: float
    """All one-time costs, with compilation from the cache."""
    cold_start: float
    """All one-time costs, with compilation and an empty cache."""
    validation: float
    """Time of one validation."""
    save: float
    """Time to save one checkpoint."""
    sample: float
    """Time of one sample."""


def measure(
    job: Job, probe: Callable[[Job], None], *, compile: bool | None = None, allowance: float = ALLOWANCE
) -> Timing:
    """Measure the times of a job's parts with two short probes.

    Args:
        job: the job to measure; its folder must exist.
        probe: trains a job to its end, in the same number of processes as the real run.
        compile: whether the step is compiled; None: the config's value.
        allowance: approximate limit of the second probe in seconds, without one-time costs.
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
        forward = step / 3 * windows.tokens / config.batch.tokens  # estimated seconds of a full validation
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
        Seconds of the one-time costs, of a step, and of each of "validation", "save" and "sample".
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
    """Count the steps from 1 to `steps` that are the last one or a multiple of any `every`.

    A 0 in `every` is ignored; see each_step.due.
    """
    intervals = [interval for interval in every if interval > 0]
    if not intervals or not steps:
        return min(1, steps)
    single = sum(steps // interval for interval in intervals)
    both = steps // math.lcm(*intervals) if len(intervals) == 2 else 0
    return single - both + all(steps % interval for interval in intervals)


def seconds_of(config: TrainConfig, timing: Timing, steps: int) -> float:
    """Estimated total time of a run with this many steps, in seconds."""
    return (
        timing.start
        + steps * timing.step
        + times_due(steps, config.eval.every) * timing.validation
        + times_due(steps, config.checkpoint.every, config.eval.every) * timing.save  # any validation may be the best
        + times_due(steps, config.sample.every) * timing.sample
    )


def steps_within(config: TrainConfig, timing: Timing, seconds: float) -> int:
    """The largest number of steps whose run fits into this many seconds; 0 if not even one does."""
    most = max(0, int(seconds / timing.step)) + 1
    return bisect_right(range(1, most + 1), seconds, key=lambda steps: seconds_of(config, timing, steps))


def compilation_pays(plain: Timing, compiled: Timing, steps: int) -> bool:
    """Whether to compile a run: it gets shorter, and uncompiled it lasts more than five times the cost of compiling.

    Args:
        plain: measure(..., compile=False).
        compiled: measure(..., compile=True).
        steps: number of steps of the run.
    """
    cost = max(0.0, compiled.cold_start - plain.cold_start)
    return steps * (plain.step - compiled.step) > cost and steps * plain.step > WORTH * cost


def decide_compilation(job: Job, probe: Callable[[Job], None]) -> TrainConfig:
    """Resolve trainer.compile and report the reason. Returns the new config.

    A short run is not compiled. For a longer run, probes measure what compiling costs and saves. The length of a run is
    estimated from its FLOPs on a CPU. On a GPU a short probe measures it, since launching a small model's kernels takes
    longer than computing them.
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
        compiled, why = False, f"a run of at most {most:.0f} s is too short for it"
    else:
        allowance = COMPARED_ON_GPU if on_gpu else COMPARED
        plain = plain or measure(job, probe, compile=False, allowance=allowance)
        try:
            quick = measure(job, probe, compile=True, allowance=allowance)
        except MinigptError as error:  # a run that only works uncompiled is trained uncompiled
            if error.exit_code not in (NotLearning.exit_code, MemoryExceeded.exit_code):
                raise
            compiled, why = False, f"the compiled step does not train ({error})"
        else:
            steps = int(most / plain.step) if config.minutes is not None else trainer.max_steps
            compiled = compilation_pays(plain, quick, steps)
            cold = max(0.0, quick.cold_start - plain.cold_start)
            why = f"a step takes {quick.step:.3g} s compiled and {plain.step:.3g} s uncompiled, compiling {cold:.0f} s"
    notice(f"{'compiled' if compiled else 'not compiled'}: {why}")
    return replace(config, trainer=replace(trainer, compile=compiled))


def plan(job: Job, probe: Callable[[Job], None]) -> TrainConfig:
    """Resolve, for a new job, the settings that need a probe: trainer.compile, and trainer.max_steps from `minutes`."""
    began = time.monotonic()
    config = job.config
    if config.trainer.compile is None:
        config = decide_compilation(job, probe)
    if config.minutes is not None:
        config = plan_steps(replace(job, config=config), probe, time.monotonic() - began)
    return config


def plan_steps(job: Job, probe: Callable[[Job], None], spent_before: float = 0.0) -> TrainConfig:
    """Set trainer.max_steps so that the run, including the probes, takes `minutes`; report the calculation.

    Args:
        job: the job, whose config has `minutes`.
        probe: as in measure.
        spent_before: seconds of the budget that are already used.

    Raises:
        ConfigError: the time is too short for one step.
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
            f"minutes: {config.minutes:g} is too short for one step: the probe took {spent:.0f} s; start-up, one step "
            f"and the end of the run take {needed - spent:.0f} s; give at least {math.ceil(needed / 6) / 10:g}"
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
    """At the end of a run with `minutes`, print the planned and the actual time."""
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
