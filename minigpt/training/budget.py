"""`--minutes`: a short probe measures the run, and sets its number of steps once.

The probe is the run itself: the same job, by the same way into the same number of processes, in a folder that is
thrown away. It runs twice. The first time fills the compiler's cache and tells roughly what a step takes; the second
finds what the real run will find, so what happens once (processes, model, compilation from the cache) costs the same.
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

FIRST_STEPS = 3  # of the first probe: one that compiles, and two to learn from
MOST_STEPS = 400  # of the second
ALLOWANCE = 20.0  # seconds for the second probe, or SHARE of the budget where that is less
SHARE = 0.05
# Seconds: compiling takes a minute or more on a CPU, a quarter of one on a GPU, and a run must last five times as long.
SHORT, SHORT_ON_GPU = 300.0, 60.0
LEAST_UTILISATION = 0.3  # of the peak of matrix products, that training on a CPU reaches
COMPARED, COMPARED_ON_GPU = 5.0, 1.0  # seconds for each of the two probes that compare
WORTH = 5.0  # times the cost of compiling that a run must last to be compiled


@dataclass(frozen=True)
class Timing:
    """Seconds of a job's parts, as a probe found them."""

    step: float
    """One step."""
    start: float
    """All that happens once, with compilation from the cache."""
    cold_start: float
    """All that happens once, with compilation where nothing is cached."""
    validation: float
    """One validation."""
    save: float
    """One checkpoint."""
    sample: float
    """One sample."""


def measure(
    job: Job, probe: Callable[[Job], None], *, compile: bool | None = None, allowance: float = ALLOWANCE
) -> Timing:
    """Time a job in small.

    Args:
        job: what is to be trained; its folder must be there.
        probe: trains a job to its end, in as many processes as the real one.
        compile: whether the step is compiled; None: as the config says.
        allowance: about how many seconds the second probe may take, beside what happens once.
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
        forward = step / 3 * windows.tokens / config.batch.tokens  # seconds, about
        tokens = max(config.model.block_size, int(windows.tokens * min(1.0, allowance / 4 / forward)))
        part = validation_windows(corpus.val, config.model.block_size, tokens).tokens / windows.tokens
    rows = max(1, min(config.trainer.log_every_n_steps, steps // 8))
    start, step, spent = _probe(job, probe, config, steps, rows, tokens)
    validation = spent["validation"] / part if windows is not None else 0.0
    return Timing(step, start, cold_start, validation, spent["save"], spent["sample"])


def _probe(
    job: Job, probe: Callable[[Job], None], config: TrainConfig, steps: int, rows: int, tokens: int
) -> tuple[float, float, dict[str, float]]:
    """Train a few steps, validate, save and sample once: seconds of what happens once, of a step, of each of those."""
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
    """At how many of the steps 1 to `steps` something happens that is due at the last and at multiples of any `every`.

    A 0 among `every` has no multiples; see each_step.due.
    """
    intervals = [interval for interval in every if interval > 0]
    if not intervals or not steps:
        return min(1, steps)
    single = sum(steps // interval for interval in intervals)
    both = steps // math.lcm(*intervals) if len(intervals) == 2 else 0
    return single - both + all(steps % interval for interval in intervals)


def seconds_of(config: TrainConfig, timing: Timing, steps: int) -> float:
    """How long a run of so many steps takes from its start to its end."""
    return (
        timing.start
        + steps * timing.step
        + times_due(steps, config.eval.every) * timing.validation
        + times_due(steps, config.checkpoint.every, config.eval.every) * timing.save  # each may be the best so far
        + times_due(steps, config.sample.every) * timing.sample
    )


def steps_within(config: TrainConfig, timing: Timing, seconds: float) -> int:
    """The most steps whose run ends within so many seconds; 0 where not even one does."""
    most = max(0, int(seconds / timing.step)) + 1
    return bisect_right(range(1, most + 1), seconds, key=lambda steps: seconds_of(config, timing, steps))


def compilation_pays(plain: Timing, compiled: Timing, steps: int) -> bool:
    """Whether a run of so many steps should be compiled: it gets shorter, and lasts five times what compiling costs.

    Args:
        plain: measure(..., compile=False).
        compiled: measure(..., compile=True).
        steps: of the run.
    """
    cost = max(0.0, compiled.cold_start - plain.cold_start)
    return steps * (plain.step - compiled.step) > cost and steps * plain.step > WORTH * cost


def decide_compilation(job: Job, probe: Callable[[Job], None]) -> TrainConfig:
    """The job's config with trainer.compile decided; says why.

    A run that is too short for it is not compiled, without asking further; of a longer one a probe measures what
    compiling costs and saves. How long a run takes follows from its FLOPs on a CPU. On a GPU, where launching a small
    model's kernels takes longer than computing them, a short probe tells.
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
        except MinigptError as error:  # what works uncompiled is trained uncompiled
            if error.exit_code not in (NotLearning.exit_code, MemoryExceeded.exit_code):
                raise
            compiled, why = False, f"compiled, it does not train ({error})"
        else:
            steps = int(most / plain.step) if config.minutes is not None else trainer.max_steps
            compiled = compilation_pays(plain, quick, steps)
            cold = max(0.0, quick.cold_start - plain.cold_start)
            why = f"a step takes {quick.step:.3g} s compiled and {plain.step:.3g} s as it is, compiling {cold:.0f} s"
    notice(f"{'compiled' if compiled else 'not compiled'}: {why}")
    return replace(config, trainer=replace(trainer, compile=compiled))


def plan(job: Job, probe: Callable[[Job], None]) -> TrainConfig:
    """The config of a new job with what only a probe can tell: trainer.compile, and the steps that fill its minutes."""
    began = time.monotonic()
    config = job.config
    if config.trainer.compile is None:
        config = decide_compilation(job, probe)
    if config.minutes is not None:
        config = plan_steps(replace(job, config=config), probe, time.monotonic() - began)
    return config


def plan_steps(job: Job, probe: Callable[[Job], None], spent_before: float = 0.0) -> TrainConfig:
    """The job's config with the max_steps that fill its minutes, the probe's own time included; says how it came about.

    Args:
        job: whose minutes.
        probe: as in measure.
        spent_before: seconds of the budget that are gone.

    Raises:
        ConfigError: the minutes do not suffice for one step.
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
            f"minutes: {config.minutes:g} leave no time for a step: the probe took {spent:.0f} s, start, one step and "
            f"what is due at the end take {needed - spent:.0f} s; give at least {math.ceil(needed / 6) / 10:g}"
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
    """At the end of a run that was given minutes: what was planned, and what it took."""
    rows = read_metrics(job.run / "metrics.jsonl")
    if job.config.minutes is None or not rows:
        return
    ends = [row for row in rows if "time/training" in row]
    spent = {what: sum(row[f"time/{what}"] for row in ends) for what in ("validation", "save", "sample")}
    apart = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in spent.items() if seconds)
    notice(
        f"planned for {job.config.minutes:g} minutes, probe and start included: {rows[-1]['step']:,} steps took "
        f"{max(row['seconds'] for row in rows) / 60:.2f} minutes{f' ({apart})' if apart else ''}"
    )
