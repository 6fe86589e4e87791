"""All settings of a training run: name, type, default, unit and meaning.

The command line, YAML files and `--help` are generated from these dataclasses. Fields that depend on a preset, the
tokenizer or the machine default to None; the config that a run stores contains the resolved values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from minigpt.choices import Row, Table, under
from minigpt.data.config import DataConfig
from minigpt.errors import ConfigError
from minigpt.model.config import TABLES as MODEL_TABLES
from minigpt.model.config import GPTConfig
from minigpt.tokenizer.config import KINDS, TokenizerConfig

OPTIMIZERS = Table(
    "optimizer",
    "optimizer.name",
    {
        "muon": Row("minigpt.training.recipe.optimizer:muon", "Muon for matrices inside blocks, AdamW for the rest"),
        "adamw": Row("minigpt.training.recipe.optimizer:adamw", "AdamW for all parameters"),
    },
)
SCHEDULES = Table(
    "schedule",
    "optimizer.schedule",
    {
        "cosine": Row("minigpt.training.recipe.schedule:cosine", "half a cosine"),
        "wsd": Row("minigpt.training.recipe.schedule:wsd", "constant, then linear decay"),
        "constant": Row("minigpt.training.recipe.schedule:constant", "constant"),
    },
)
LOSSES = Table("loss", "losses", {})
LOGGERS = Table(
    "logger",
    "log",
    {
        "none": Row("minigpt.training.run.loggers:no_logger", "only metrics.jsonl"),
        "wandb": Row("minigpt.training.run.loggers:wandb", "Weights & Biases; offline without a key"),
        "tensorboard": Row("minigpt.training.run.loggers:tensorboard", "needs pip install 'minigpt-lab[tensorboard]'"),
    },
)


def choice(default: str, table: Table) -> Any:
    """A config field that names a row of a table."""
    return field(default=default, metadata={"table": table})


@dataclass(frozen=True)
class BatchConfig:
    """Batch size of a step, and how it is divided."""

    tokens: int = 2048
    """Tokens per optimizer step, summed over all processes; a multiple of model.block_size."""
    micro_batch_size: int | None = None
    """Sequences per forward pass on one process; gradients of the others are accumulated. null: all in one pass."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and weight averaging."""

    name: str = choice("muon", OPTIMIZERS)
    """Optimizer."""
    learning_rate: float = 8e-3
    """Peak learning rate of AdamW."""
    embedding_learning_rate: float = 0.05
    """Peak learning rate of AdamW for embeddings that are initialised with unit variance (modern preset)."""
    muon_learning_rate: float = 0.03
    """Peak learning rate of Muon; it follows the same schedule."""
    muon_momentum: float = 0.95
    """Muon: momentum (decay of the running mean of gradients)."""
    newton_schulz_steps: int = 5
    """Muon: Newton-Schulz iterations that orthogonalise an update."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step (cosine and wsd); all other rates fall to the same fraction of their peak."""
    schedule: str = choice("wsd", SCHEDULES)
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.6
    """wsd: fraction of the steps, at the end, in which the learning rate falls."""
    beta1: float = 0.9
    """AdamW: decay of the running mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """AdamW: constant added to the denominator."""
    weight_decay: float = 0.25
    """Decoupled weight decay of matrices and embeddings, multiplied by learning_rate for all of them; norms and biases
    have none.
    """
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, such as 0.99. The average is what is validated,
    saved and sampled. 0: no average.
    """
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of plug-ins, by dotted name: {"schedule.cycles": 4}, on the command line --optimizer.schedule.cycles 4.
    """

    def own(self, what: str) -> dict[str, Any]:
        """The settings of the optimizer ("name") or the schedule ("schedule") that are its own."""
        return under(what, self.settings)


@dataclass(frozen=True)
class TrainerConfig:
    """Arguments of Lightning's Trainer under Lightning's names, and compilation."""

    max_steps: int = 400
    """Optimizer steps in the whole run."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Device to train on; auto uses a GPU if there is one."""
    devices: int = 1
    """Processes on this machine, one per device."""
    num_nodes: int = 1
    """Number of machines. With more than one, start the same command on each with torchrun or a scheduler."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Parallelism of several processes: ddp replicates the model, fsdp shards it (FSDP2); auto means ddp."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Number format of the computation; auto measures once which is faster on this machine and reports it."""
    gradient_clip_val: float = 1.0
    """Maximum norm of the gradient of all parameters together; 0 turns clipping off."""
    log_every_n_steps: int = 10
    """Steps between two rows of metrics.jsonl."""
    compile: bool | None = None
    """Compile the training step with torch.compile: slower start, faster steps. null: only if the run is long enough
    to gain from it.
    """
    activation_checkpointing: bool = False
    """Store only the input of each block for the backward pass and recompute the rest: less memory, about a third more
    time.
    """
    threads: int | None = None
    """CPU threads per process; null: all cores, divided among the processes."""
    hang_seconds: float = 60.0
    """Seconds that one process may lag behind the others before the run stops and names it. 0: wait forever."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints."""

    every: int = 200
    """Steps between two checkpoints. The last step and every new best validation are saved as well."""
    keep: int = 2
    """How many of the newest checkpoints to keep, at least 2; the best one is kept in addition."""


@dataclass(frozen=True)
class EvalConfig:
    """When to validate, and on how many tokens."""

    every: int = 100
    """Steps between two validations; the last step is always validated. 0: only the last."""
    tokens: int = 1_000_000
    """Validate on this many evenly spaced tokens, or on the whole validation split if it is smaller."""
    patience: int = 0
    """Early stopping: stop after this many validations in a row without a new lowest loss. 0: never."""


@dataclass(frozen=True)
class SampleConfig:
    """Samples during training, always with the same prompt and seed, so that they can be compared."""

    every: int = 0
    """Steps between two samples; 0: only at the last step."""
    prompt: str = "\n"
    """Prompt of the samples."""
    max_new_tokens: int = 200
    """Tokens per sample; 0: no samples."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy."""


@dataclass(frozen=True)
class InternalsConfig:
    """Snapshots of the internals during training: head scores, ablations, loss by position. See `minigpt dynamics`."""

    every: int | Literal["log"] = 0
    """Steps between two snapshots of head scores and ablations; log: two snapshots per doubling of the step; 0: none.
    """


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `minigpt train --config FILE --section.field VALUE`; later values override earlier ones."""

    run_name: str | None = None
    """Name of the run's folder in runs_dir. null starts a new run, named after its corpus and the time."""
    runs_dir: str = "runs"
    """Folder that holds the runs."""
    resume: Literal["auto", "must", "never"] = "auto"
    """If run_name exists: auto resumes it, never is an error. If it does not exist: must is an error."""
    minutes: float | None = None
    """Time budget of the run in minutes. A short measurement before the first step sets trainer.max_steps, once."""
    seed: int = 1337
    """Random seed of initialisation, data order and dropout."""
    log: str = choice("none", LOGGERS)
    """Where to log metrics besides metrics.jsonl."""
    plugins: list[str] = field(default_factory=list)
    """Modules or .py files that register parts, optimizers, losses and the like; runs their code. --plugins FILE."""
    losses: dict[str, Any] = field(default_factory=dict)
    """Losses to add to the cross-entropy, each with its weight: {"z_loss": 1e-4}, on the command line --losses.z_loss
    1e-4. Settings of a loss: --losses.z_loss.NAME VALUE.
    """
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
        """Rows of block_size tokens per step, over all processes."""
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

    def registered_in(self, module: str) -> list[str]:
        """The config's choices that were registered in a module, such as "model.norm 'dyt'"."""
        chosen = [(table, str(getattr(self.model, field))) for field, table in MODEL_TABLES.items()]
        chosen += [(OPTIMIZERS, self.optimizer.name), (SCHEDULES, self.optimizer.schedule), (LOGGERS, self.log)]
        chosen += [(KINDS, self.tokenizer.kind), *((LOSSES, name) for name in self.losses if "." not in name)]
        return [f"{table.where} '{name}'" for table, name in chosen if table.rows[name].module == module]

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
        self._check_choices()
        for name in ("devices", "num_nodes"):
            if getattr(self.trainer, name) < 1:
                raise ConfigError(f"trainer.{name}: {getattr(self.trainer, name)} is not positive; expected 1 or more")
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
                raise ConfigError(f"{name}: {value} is not a finite number above 0")
        if rows % (self.processes * self.micro_batch_size):
            raise ConfigError(
                f"batch: {rows} rows per step ({self.batch.tokens} tokens / block_size {block}) do not divide among "
                f"{self.processes} processes x micro_batch_size {self.micro_batch_size}; change batch.tokens or "
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
                raise ConfigError(f"{name}: {value} is negative or not finite; expected 0 or more")
        if self.seed >= 2**63:
            raise ConfigError(f"seed: {self.seed} is not below 2**63; expected 0 to 2**63 - 1")
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
            raise ConfigError(f"trainer.threads: {self.trainer.threads} is not positive; expected 1 or more")

    def _check_choices(self) -> None:
        """Raise ConfigError for a name that is in no table, naming the plug-ins that the run had."""
        OPTIMIZERS.own(self.optimizer.name, self.optimizer.own("name"))
        SCHEDULES.own(self.optimizer.schedule, self.optimizer.own("schedule"))
        if wrong := [name for name in self.optimizer.settings if name.partition(".")[0] not in ("name", "schedule")]:
            raise ConfigError(f"optimizer.settings: {wrong[0]!r} is not of the form name.NAME or schedule.NAME")
        LOGGERS.check(self.log)
        for name, weight in self.losses.items():
            loss, _, setting = name.partition(".")
            if not setting:
                LOSSES.check(loss, "losses")
                LOSSES.own(loss, under(loss, self.losses), f"losses.{loss}")
                if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not abs(weight) < float("inf"):
                    raise ConfigError(f"losses.{loss}: {weight!r} is not a finite number; give the weight of the loss")
            elif loss not in self.losses:
                raise ConfigError(f"losses.{name}: is a setting of {loss}, which has no weight; add --losses.{loss} W")


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
