"""All settings of a training run: name, type, default, unit and meaning.

The command line, YAML files and `--help` are generated from these dataclasses. A field whose value depends on the
preset, the tokenizer or the machine defaults to None; the config stored with a run holds the resolved value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from minigpt.data.config import DataConfig
from minigpt.errors import ConfigError
from minigpt.model.config import GPTConfig
from minigpt.tokenizer.config import TokenizerConfig


@dataclass(frozen=True)
class BatchConfig:
    """Batch size in tokens, and how it is split into micro-batches."""

    tokens: int = 2048
    """Tokens per optimizer step, summed over all processes; must be a multiple of model.block_size."""
    micro_batch_size: int | None = None
    """Sequences per forward pass on each process; gradients are accumulated over the rest. null: no accumulation."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer (Muon and AdamW, or AdamW alone), learning-rate schedule and weight averaging."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the weight matrices inside blocks, AdamW for all other parameters. adamw: AdamW for all."""
    learning_rate: float = 8e-3
    """Peak learning rate of AdamW."""
    embedding_learning_rate: float = 0.05
    """Peak learning rate of AdamW for embeddings initialised with unit variance (modern preset)."""
    muon_learning_rate: float = 0.03
    """Peak learning rate of Muon; follows the same schedule as learning_rate."""
    muon_momentum: float = 0.95
    """Muon: decay rate of the gradient's exponential moving average (momentum)."""
    newton_schulz_steps: int = 5
    """Muon: Newton-Schulz iterations that orthogonalise each update."""
    final_learning_rate: float = 0.0
    """learning_rate at the end of cosine and wsd; the other learning rates decay in proportion."""
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    """Learning rate after warm-up: cosine decay, wsd (warmup-stable-decay: constant, then linear decay) or constant."""
    warmup_steps: int = 50
    """Steps of linear learning-rate warm-up from 0; 0: no warm-up."""
    decay_fraction: float = 0.6
    """wsd: fraction of max_steps, at the end of the run, over which the learning rate decays linearly."""
    beta1: float = 0.9
    """AdamW: decay rate of the gradient's moving average (first moment)."""
    beta2: float = 0.95
    """AdamW: decay rate of the squared gradient's moving average (second moment)."""
    eps: float = 1e-8
    """AdamW: constant added to the denominator."""
    weight_decay: float = 0.25
    """Decoupled weight decay of matrices and embeddings, always scaled by learning_rate; none on norms and biases."""
    ema_decay: float = 0.0
    """Decay per step (such as 0.99) of a moving average of the weights, used to validate, save and sample. 0: off."""


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of Lightning's Trainer, under Lightning's names, and of torch.compile."""

    max_steps: int = 400
    """Optimizer steps in the whole run."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Device type to train on; auto uses a GPU if one is available."""
    devices: int = 1
    """Devices per machine, with one process each."""
    num_nodes: int = 1
    """Number of machines; above 1, start the same command on each with torchrun or a cluster scheduler."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Multi-process strategy: ddp replicates the model, fsdp shards it (FSDP2); auto is ddp."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """float32, or bfloat16 autocast; auto picks the faster one for this device and reports the choice."""
    gradient_clip_val: float = 1.0
    """Clip the global gradient norm to this value; 0: no clipping."""
    log_every_n_steps: int = 10
    """Steps between two rows of metrics."""
    compile: bool | None = None
    """Use torch.compile: slower start, faster steps. null: compile if the run is long enough to save time."""
    activation_checkpointing: bool = False
    """Store only each block's input and recompute the rest in the backward pass: less memory, a third more time."""
    threads: int | None = None
    """CPU threads per process; null: all cores, divided among the processes."""
    hang_seconds: float = 60.0
    """Stop the run, naming the process, when a process lags this many seconds behind the others. 0: wait forever."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and how many to keep."""

    every: int = 200
    """Steps between two checkpoints. The last step and each new lowest validation loss are saved as well."""
    keep: int = 2
    """Number of newest checkpoints to keep, at least 2; the one with the lowest validation loss is always kept."""


@dataclass(frozen=True)
class EvalConfig:
    """When to validate, and on how many tokens."""

    every: int = 100
    """Steps between two validations; the last step is always validated. 0: only the last step."""
    tokens: int = 1_000_000
    """Most validation tokens to use; a larger validation split is sampled at evenly spaced positions."""
    patience: int = 0
    """Early stopping: stop after this many validations in a row without a new lowest loss. 0: no early stopping."""


@dataclass(frozen=True)
class SampleConfig:
    """Samples generated during training, always with the same prompt and seed, so that they can be compared."""

    every: int = 0
    """Steps between two samples; 0: only at the last step."""
    prompt: str = "\n"
    """Prompt of each sample."""
    max_new_tokens: int = 200
    """Tokens to generate per sample; 0: no samples."""
    temperature: float = 0.8
    """Sampling temperature: 1 uses the model's distribution, lower values sharpen it, 0 is greedy decoding."""


@dataclass(frozen=True)
class InternalsConfig:
    """Snapshots of the model's internals during training: head scores, ablations, loss by position.

    `minigpt dynamics` plots them.
    """

    every: int | Literal["log"] = 0
    """Steps between two snapshots, or log: two snapshots per doubling of the step count. 0: no snapshots."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `minigpt train --config FILE --section.field VALUE`; later values override earlier ones."""

    run_name: str | None = None
    """Name of the run's folder under runs_dir. null starts a new run, named after the corpus and the time."""
    runs_dir: str = "runs"
    """Folder that holds all runs."""
    resume: Literal["auto", "must", "never"] = "auto"
    """With run_name: auto resumes the run if it exists, must fails if it does not, never fails if it does."""
    minutes: float | None = None
    """Time budget of the run in minutes: a short measurement sets trainer.max_steps once. null: use max_steps."""
    seed: int = 1337
    """Random seed of initialisation, data order and dropout."""
    log: Literal["none", "wandb", "tensorboard"] = "none"
    """Experiment tracker, in addition to metrics.jsonl. tensorboard needs pip install 'minigpt-lab[tensorboard]'."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(kind="bpe", vocab_size=1024))
    model: GPTConfig = field(default_factory=GPTConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    internals: InternalsConfig = field(default_factory=InternalsConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain values, as stored in config.yaml."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """Dict of every field by its dotted name, such as model.n_layer."""
        return flatten(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a config from a dict such as to_dict returns. Raises ConfigError for an unknown field."""
        return _build(cls, values, "")

    @property
    def processes(self) -> int:
        """Number of processes over all machines."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def batch_size(self) -> int:
        """Sequences of block_size tokens per optimizer step, over all processes."""
        return self.batch.tokens // self.model.block_size

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass on each process."""
        given = self.batch.micro_batch_size
        return self.batch_size // self.processes if given is None else given

    @property
    def accumulation(self) -> int:
        """Gradient accumulation: forward passes per optimizer step on each process."""
        return self.batch_size // (self.processes * self.micro_batch_size)

    def check(self) -> None:
        """Raise ConfigError, naming the field, for a value that cannot be trained with or stored with a run."""
        for field_name, value in self.flat().items():
            if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
                pattern = " (or give a glob with ? for each such byte)" if field_name == "data.source" else ""
                raise ConfigError(
                    f"{field_name}: {value!r} is not UTF-8 and cannot be stored with a run; rename it{pattern}"
                )
        name = self.run_name
        if name is not None and (not name or Path(name).name != name or name.startswith(".")):
            raise ConfigError(
                f"run_name: {name!r} is not a plain folder name; remove slashes and leading dots, or omit run_name "
                f"for an automatic name"
            )
        if not self.runs_dir:
            raise ConfigError("runs_dir is empty; give a folder, such as runs")
        self.data.check()
        for name in ("devices", "num_nodes"):
            if getattr(self.trainer, name) < 1:
                raise ConfigError(f"trainer.{name}: {getattr(self.trainer, name)} is not positive")
        block, rows = self.model.block_size, self.batch_size
        if self.batch.tokens < block or self.batch.tokens % block:
            near = max(1, round(self.batch.tokens / block)) * block
            raise ConfigError(
                f"batch.tokens: {self.batch.tokens} is not a multiple of model.block_size ({block}); try {near}"
            )
        positive = {
            "trainer.max_steps": self.trainer.max_steps,
            "trainer.log_every_n_steps": self.trainer.log_every_n_steps,
            "checkpoint.every": self.checkpoint.every,
            "eval.tokens": self.eval.tokens,
            "batch.micro_batch_size": self.micro_batch_size,
            "optimizer.learning_rate": self.optimizer.learning_rate,
            "optimizer.embedding_learning_rate": self.optimizer.embedding_learning_rate,
            "optimizer.muon_learning_rate": self.optimizer.muon_learning_rate,
            "optimizer.newton_schulz_steps": self.optimizer.newton_schulz_steps,
            "minutes": 1.0 if self.minutes is None else self.minutes,
            "optimizer.eps": self.optimizer.eps,
        }
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}: {value} is not positive")
        if rows % (self.processes * self.micro_batch_size):
            raise ConfigError(
                f"batch: {rows} sequences per step ({self.batch.tokens} tokens / block_size {block}) are not divisible "
                f"by {self.processes} processes x micro_batch_size {self.micro_batch_size}; change batch.tokens or "
                f"batch.micro_batch_size"
            )
        not_negative = {
            "optimizer.final_learning_rate": self.optimizer.final_learning_rate,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "trainer.gradient_clip_val": self.trainer.gradient_clip_val,
            "trainer.hang_seconds": self.trainer.hang_seconds,
            "eval.every": self.eval.every,
            "eval.patience": self.eval.patience,
            "sample.every": self.sample.every,
            "internals.every": 0 if self.internals.every == "log" else self.internals.every,
            "sample.max_new_tokens": self.sample.max_new_tokens,
            "sample.temperature": self.sample.temperature,
            "seed": self.seed,
        }
        for name, value in not_negative.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}: {value} is negative or not finite")
        if self.seed >= 2**63:
            raise ConfigError(f"seed: {self.seed} is not below 2**63")
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            if not 0 <= getattr(self.optimizer, name) < 1:
                raise ConfigError(f"optimizer.{name}: {getattr(self.optimizer, name)} is not in [0, 1)")
        if not 0 <= self.optimizer.decay_fraction <= 1:
            raise ConfigError(f"optimizer.decay_fraction: {self.optimizer.decay_fraction} is not in [0, 1]")
        if self.checkpoint.keep < 2:
            raise ConfigError(
                f"checkpoint.keep: {self.checkpoint.keep} is less than 2; give 2 or more, so that a checkpoint is left "
                f"if the newest is damaged"
            )
        if self.eval.patience and not self.eval.every:
            raise ConfigError(
                f"eval.patience: {self.eval.patience} counts validations, but eval.every is 0; set eval.every to 1 or "
                f"more"
            )
        if self.trainer.threads is not None and self.trainer.threads < 1:
            raise ConfigError(f"trainer.threads: {self.trainer.threads} is not positive")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections into one dict with dotted names."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    defaults = {
        each.name: each.default_factory() if callable(each.default_factory) else each.default for each in fields(kind)
    }
    built = {}
    for name, value in values.items():
        if name not in defaults:
            near = get_close_matches(name, defaults, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else ""
            raise ConfigError(f"{where}{name}: unknown field{hint}")
        section = is_dataclass(defaults[name])
        built[name] = _build(type(defaults[name]), value, f"{where}{name}.") if section else value
    return kind(**built)
