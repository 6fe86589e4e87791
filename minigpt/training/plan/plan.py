"""Estimate of a run: parameters, memory, FLOPs, tokens, time here and on GPUs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from minigpt.data.corpus import find_source
from minigpt.data.prepare import find_prepared
from minigpt.data.shards import Corpus
from minigpt.errors import ConfigError
from minigpt.model.cost import activations_of, cost_of
from minigpt.model.gpt import GPT
from minigpt.terminal import clock, readable
from minigpt.tokenizer.config import KINDS
from minigpt.training.config import TrainConfig
from minigpt.training.plan.choose import pick_precision
from minigpt.training.plan.hardware import ACCELERATORS, machine_memory, peak_flops
from minigpt.training.recipe.loss import CPU_LOGITS, GPU_LOGITS, Objective
from minigpt.training.recipe.optimizer import make_optimizer, optimizer_bytes

OPTIMAL_TOKENS = 20  # compute-optimal tokens per parameter (Hoffmann et al. 2022, arXiv 2203.15556)
MOST_EPOCHS = 4  # epochs that are about as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)
QUICK = 5.0  # expected seconds up to which a step is measured by default


@dataclass(frozen=True)
class Memory:
    """Memory that one process needs for training, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.logits


def memory_of(config: TrainConfig, half: bool, on_gpu: bool) -> Memory:
    """Estimate the peak memory of one process, without the memory that torch itself uses.

    Under fsdp each process holds its shard of weights, gradients, optimizer state and averages; under ddp it holds all
    of them. Activations are those of one micro-batch. Logits are those that exist at once (see loss.chunked_loss), with
    their gradient and the loss's intermediate values.

    Args:
        config: a config with model.vocab_size set.
        half: whether matrix products are in bfloat16.
        on_gpu: whether training runs on a GPU, where the loss handles more logits at once.
    """
    cost, kept = cost_of(config.model), activations_of(config.model, half, on_gpu)
    share = 1 / config.processes if config.trainer.strategy == "fsdp" else 1.0
    tokens = config.micro_batch_size * config.model.block_size
    assert config.model.vocab_size is not None
    at_once = min(tokens, max(1, (GPU_LOGITS if on_gpu else CPU_LOGITS) // config.model.vocab_size))
    casts = 2 * cost.parameters if half else 0  # autocast's copies of the matrices
    return Memory(
        weights=4 * cost.parameters * share,
        gradients=4 * cost.parameters * share,
        optimizer=optimizer_bytes(config.model, config.optimizer) * share,
        average=4 * cost.parameters * share if config.optimizer.ema_decay else 0.0,
        activations=kept.bytes(config.model.n_layer, tokens, config.trainer.activation_checkpointing) + casts,
        logits=at_once * (kept.logits + 8 * config.model.vocab_size),
    )


def corpus_tokens(config: TrainConfig, corpus: Corpus | None) -> int | None:
    """Number of training tokens: exact for a prepared corpus, estimated from bytes for byte and char tokenizers.

    Returns:
        None if the number is unknown.
    """
    if corpus is not None:
        return len(corpus.train)
    if not KINDS.fact(config.tokenizer.kind, "per_byte") or config.data.source == "-":
        return None
    size = find_source(config.data).bytes
    return round(size * (1 - config.data.val_fraction)) or None


def measured_step(config: TrainConfig, device: torch.device) -> float:
    """Measure the seconds of one optimizer step on this machine, from a few micro-batches of random tokens."""
    half = config.trainer.precision == "bf16-mixed"
    with torch.random.fork_rng(devices=[]):
        model = GPT(config.model).to(device).train()
        optimizer, objective = make_optimizer(model, config.optimizer), Objective.of(config.losses)
        ids = torch.randint(0, model.vocab_size, (config.micro_batch_size, config.model.block_size), device=device)
        forwards, updates = [], []
        for _ in range(4):
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = objective(model, ids, ids).total
            loss.backward()
            loss.item()  # waits for the GPU
            forwards.append(time.perf_counter() - began)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            updates.append(time.perf_counter() - began - forwards[-1])
    shared = config.processes if device.type == "cpu" else 1  # on a CPU, the processes share the cores
    return config.accumulation * shared * statistics.median(forwards[1:]) + statistics.median(updates[1:])


def make_plan(config: TrainConfig, utilisation: float = 0.4, measure: bool | None = None) -> dict[str, Any]:
    """Estimate a run and return the figures as plain values.

    Args:
        config: a training config; nothing is prepared, downloaded or written.
        utilisation: fraction of a device's peak FLOP/s that training is assumed to reach if it is not measured.
        measure: whether to time a few forward and backward passes on this machine; None: if that is quick.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation}: expected a fraction of the peak, above 0 and at most 1")
    config.check()
    corpus = find_prepared(config.data, config.tokenizer) if config.data.source != "-" else None
    config, notes = _settled(config, corpus)
    cost, trainer = cost_of(config.model), config.trainer
    on_gpu = trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    half = trainer.precision == "bf16-mixed"
    memory = memory_of(config, half, on_gpu)
    room = torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_memory()
    here = config.processes if device.type == "cpu" and trainer.num_nodes == 1 else 1
    fits = room is None or here * memory.total <= room

    peak = peak_flops(device, trainer.precision)
    step_flops = cost.training_flops * config.batch.tokens
    assumed = step_flops / (peak * utilisation * (config.processes if on_gpu else 1))  # nan if the peak is unknown
    if measure or (measure is None and fits and 4 * assumed / config.accumulation < QUICK):
        step, how = measured_step(config, device), "measured"
    else:
        step, how = assumed, f"at {utilisation:.0%} of the peak of {readable(peak)}FLOP/s"
    steps = trainer.max_steps
    if config.minutes is not None and step > 0:
        steps = max(1, int(60 * config.minutes / step))
        notes.append(
            f"{config.minutes:g} minutes give about {steps:,} steps; training measures the exact number when it begins"
        )
    tokens, optimal = steps * config.batch.tokens, OPTIMAL_TOKENS * cost.parameters
    text = corpus_tokens(config, corpus)
    devices = [{"device": f"this {'GPU' if on_gpu else 'CPU'}", "seconds": steps * step, "how": how, "fits": fits}]
    for entry in ACCELERATORS:
        precision = "bf16-mixed" if entry.bf16 else "32-true"
        seconds = steps * step_flops / ((entry.peak(precision) or entry.fp32) * utilisation * config.processes)
        needed = memory_of(config, precision == "bf16-mixed", True).total
        devices.append({"device": entry.name, "seconds": seconds, "how": precision, "fits": needed <= entry.memory})
    verdicts = notes + _verdicts(config, memory.total * here, room, tokens, optimal, text)
    return {
        "model": config.model.to_dict(),
        "parameters": {
            "embeddings": cost.embedding_parameters,
            "blocks": cost.block_parameters,
            "unembedding": cost.unembedding_parameters,
            "total": cost.parameters,
        },
        "memory": {**{name: round(value) for name, value in vars(memory).items()}, "total": round(memory.total)},
        "activations": {
            name: round(memory_of(replace(config, trainer=other), half, on_gpu).activations)
            for name, other in (
                ("kept", replace(trainer, activation_checkpointing=False)),
                ("checkpointed", replace(trainer, activation_checkpointing=True)),
            )
        },
        "cache_bytes_per_token": cost.cache_bytes_per_token,
        "flops": {"token": cost.training_flops, "step": step_flops, "run": cost.training_flops * tokens},
        "tokens": {
            "run": tokens,
            "compute_optimal": optimal,
            "corpus": text,
            "epochs": tokens / text if text else None,
        },
        "steps": steps,
        "utilisation": utilisation,
        "precision": trainer.precision,
        "processes": config.processes,
        "devices": devices,
        "verdicts": verdicts,
    }


def _settled(config: TrainConfig, corpus: Corpus | None) -> tuple[TrainConfig, list[str]]:
    """Return the config with vocabulary size and precision resolved or assumed, and notes about what is assumed."""
    notes = []
    vocab_size = config.model.vocab_size
    if vocab_size is None and corpus is not None:
        vocab_size = corpus.tokenizer.vocab_size
    if vocab_size is None:
        kind = config.tokenizer.kind
        trained = config.tokenizer.vocab_size if KINDS.fact(kind, "smallest") else None
        vocab_size = KINDS.fact(kind, "vocab_size", trained)
        if not isinstance(vocab_size, int):
            raise ConfigError("model.vocab_size: unknown until the corpus is prepared; set it, or run minigpt prepare")
        if assumed := KINDS.fact(kind, "assumed"):
            notes.append(f"assumes a vocabulary of {vocab_size} {assumed}; exact after minigpt prepare")
    precision = config.trainer.precision
    if precision == "auto":
        precision = pick_precision(config)[0]  # type: ignore[assignment]
    settled = replace(config.model, vocab_size=vocab_size)
    return replace(config, model=settled, trainer=replace(config.trainer, precision=precision)), notes


def _verdicts(
    config: TrainConfig, needed: float, room: float | None, tokens: int, optimal: int, text: int | None
) -> list[str]:
    said = []
    if room is not None:
        verb = "fits" if needed <= room else "does not fit"
        said.append(f"{verb} this machine's memory: {readable(needed)}B of {readable(room)}B")
        if needed > room:
            said[-1] += "; lower batch.micro_batch_size, or set --trainer.activation_checkpointing true"
    if tokens < optimal / 2:
        said.append(f"{tokens / optimal:.2g} times the compute-optimal tokens: train longer, or use a smaller model")
    elif tokens > 2 * optimal:
        said.append(f"{tokens / optimal:.2g} times the compute-optimal tokens: a larger model would reach a lower loss")
    if text and tokens > MOST_EPOCHS * text:
        line = f"{tokens / text:.3g} epochs over the corpus: expect overfitting"
        remedies = [] if config.model.dropout else ["--model.dropout 0.1"]
        remedies += [] if config.eval.patience else ["--eval.patience 5"]
        said.append(f"{line}; give {' and '.join(remedies)}" if remedies else line)
    return said


def show(plan: dict[str, Any]) -> str:
    """Format the result of make_plan as a table."""
    parts, memory, tokens = plan["parameters"], plan["memory"], plan["tokens"]
    processes = f" in each of {plan['processes']} processes" if plan["processes"] > 1 else ""
    epochs = f"; the corpus has {readable(tokens['corpus'])}: {tokens['epochs']:.3g} epochs" if tokens["epochs"] else ""
    sizes = ("preset", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "block_size", "vocab_size", "dropout")
    lines = [
        "model        " + "  ".join(f"{name} {plan['model'][name]}" for name in sizes),
        f"parameters   {parts['total']:,} (embeddings {parts['embeddings']:,}, blocks {parts['blocks']:,}, "
        f"unembedding {parts['unembedding']:,})",
        f"memory       {readable(memory['total'])}B{processes} ("
        + ", ".join(f"{name} {readable(size)}B" for name, size in memory.items() if name != "total" and size)
        + ")",
        f"activations  {readable(plan['activations']['kept'])}B, {readable(plan['activations']['checkpointed'])}B with "
        f"trainer.activation_checkpointing",
        f"tokens       {readable(tokens['run'])} in {plan['steps']:,} steps; compute-optimal "
        f"{readable(tokens['compute_optimal'])}{epochs}",
        f"FLOPs        {readable(plan['flops']['token'])} per token, {readable(plan['flops']['run'])} in total",
        f"KV cache     {readable(plan['cache_bytes_per_token'])}B per token of context when sampling",
        "",
        f"expected time (GPUs at {plan['utilisation']:.0%} of their peak FLOP/s; a small model reaches less)",
    ]
    for row in plan["devices"]:
        duration = clock(row["seconds"]) if row["seconds"] == row["seconds"] else "?"
        lines.append(f"{row['device']:16}{duration:>10}   {row['how']}{'' if row['fits'] else '; does not fit'}")
    return "\n".join([*lines, "", *(f"- {line}" for line in plan["verdicts"])])
