"""Everything a training run is made of, declared once: name, type, default, unit and meaning.

The command line, the YAML files and `--help` are read from these dataclasses. Fields that a
preset, the tokenizer or the machine decides default to None; the config that a run stores shows their numbers.
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
    """How many tokens a step sees, and how they are divided."""

    tokens: int = 2048
    """Tokens a step, over all processes: a multiple of model.block_size."""
    micro_batch_size: int | None = None
    """Rows of one forward on one process; the rest of a step's rows are accumulated. None: all of them at once."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon on the blocks' matrices and AdamW on the rest, or AdamW on everything; its schedule; averaged weights."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices inside blocks, AdamW for the rest. adamw: AdamW for all."""
    learning_rate: float = 8e-3
    """AdamW's peak learning rate."""
    embedding_learning_rate: float = 0.05
    """AdamW's peak learning rate for embeddings that start with unit variance (modern preset)."""
    muon_learning_rate: float = 0.03
    """Muon's peak learning rate; it follows the same schedule."""
    muon_momentum: float = 0.95
    """Muon: decay of the gradient's running mean."""
    newton_schulz_steps: int = 5
    """Muon: iterations that orthogonalise an update."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step (cosine and wsd); Muon's falls to the same part of its peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    """After the warm-up: cosine decay, wsd (stable, then linear decay) or constant."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.6
    """wsd: the last part of the steps, over which the learning rate falls."""
    beta1: float = 0.9
    """AdamW: decay of the gradient's running mean."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: float = 0.25
    """Decay of matrices and embeddings, times learning_rate, whatever their own is; norms and biases have none."""
    ema_decay: float = 0.0
    """Validate, save and sample a running average of the weights with this decay a step, say 0.99; 0: the weights."""


@dataclass(frozen=True)
class TrainerConfig:
    """What is passed to Lightning's Trainer, under Lightning's names, and how the step is compiled."""

    max_steps: int = 400
    """Optimizer steps of the whole run."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    devices: int = 1
    """Processes on this machine, one a device."""
    num_nodes: int = 1
    """Machines; more than one are started by torchrun or a scheduler, one command a machine."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work: ddp copies the model to each, fsdp shards it (FSDP2); auto means ddp."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Number format of the computation; auto measures which is faster here, once, and says so."""
    gradient_clip_val: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    log_every_n_steps: int = 10
    """Steps between two rows of metrics."""
    compile: bool | None = None
    """Compile the step with torch.compile: slow to start, faster a step. None: where the run is long enough to gain."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    threads: int | None = None
    """CPU threads a process; None: all cores, shared between the processes."""
    hang_seconds: float = 60.0
    """Seconds that one process may lag behind the others before it is named and the run is stopped. 0: wait."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save."""

    every: int = 200
    """Steps between two checkpoints; the last step is always saved, and one that validates best so far."""
    keep: int = 2
    """Newest checkpoints kept, at least 2; the best one is kept beside them."""


@dataclass(frozen=True)
class EvalConfig:
    """When and on how much text to validate."""

    every: int = 100
    """Steps between two validations; the last step always has one. 0: only the last."""
    tokens: int = 1_000_000
    """Validate on the whole validation split, or on this many evenly spaced tokens where it is larger."""
    patience: int = 0
    """Stop after this many validations in a row without a new best loss; 0: go on to the last step."""


@dataclass(frozen=True)
class SampleConfig:
    """Samples while it trains: same prompt and seed each time, so that they can be compared."""

    every: int = 0
    """Steps between two samples; 0: only at the end."""
    prompt: str = "\n"
    """What they continue."""
    max_new_tokens: int = 200
    """Tokens a sample."""
    temperature: float = 0.8
    """1 draws from the model's own distribution, less is safer, 0 is greedy."""


@dataclass(frozen=True)
class InternalsConfig:
    """Looking inside while it trains: head scores, ablations, loss by position; `minigpt dynamics` draws them."""

    every: int | Literal["log"] = 0
    """Steps between two snapshots of the model's inside, or log: two to every doubling of the steps; 0: none."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `minigpt train --config FILE --section.field VALUE`; later values win."""

    run_name: str | None = None
    """Folder under runs_dir. None starts a new run, named after its corpus and the time."""
    runs_dir: str = "runs"
    """Where runs live."""
    resume: Literal["auto", "must", "never"] = "auto"
    """With run_name: auto continues the run where it exists, must insists on it, never refuses to."""
    minutes: float | None = None
    """Let the run take this long: a short measurement sets trainer.max_steps, once."""
    seed: int = 1337
    """Decides initialisation, data order and dropout."""
    log: Literal["none", "wandb", "tensorboard"] = "none"
    """Where metrics go besides metrics.jsonl. tensorboard needs pip install 'minigpt-lab[tensorboard]'."""
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
        """Plain values, as config.yaml holds them."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, as in model.n_layer."""
        return flatten(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of to_dict. Raises ConfigError for a field this version does not know."""
        return _build(cls, values, "")

    @property
    def processes(self) -> int:
        """Processes over all machines."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def batch_size(self) -> int:
        """Rows of block_size tokens a step, over all processes."""
        return self.batch.tokens // self.model.block_size

    @property
    def micro_batch_size(self) -> int:
        """Rows of one forward on one process."""
        given = self.batch.micro_batch_size
        return self.batch_size // self.processes if given is None else given

    @property
    def accumulation(self) -> int:
        """Forwards a step on one process."""
        return self.batch_size // (self.processes * self.micro_batch_size)

    def check(self) -> None:
        """Raise ConfigError, naming the field, for what cannot be trained with or stored with a run."""
        for field_name, value in self.flat().items():
            if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
                pattern = " (or give a pattern: each such byte is a ?)" if field_name == "data.source" else ""
                raise ConfigError(
                    f"{field_name}: {value!r} is not UTF-8 and cannot be stored with a run; rename it{pattern}"
                )
        name = self.run_name
        if name is not None and (not name or Path(name).name != name or name.startswith(".")):
            raise ConfigError(
                f"run_name: {name!r} is not a plain folder name; leave slashes and leading dots out, or leave out "
                f"run_name to have one made"
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
                f"batch.tokens: {self.batch.tokens} is no multiple of model.block_size ({block}); try {near}"
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
                f"batch: {rows} rows a step ({self.batch.tokens} tokens / block_size {block}) do not divide among "
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
                f"checkpoint.keep: {self.checkpoint.keep} is less than 2; one more than the newest must stay, "
                f"in case the newest is damaged"
            )
        if self.eval.patience and not self.eval.every:
            raise ConfigError(
                f"eval.patience: {self.eval.patience} counts validations, but eval.every is 0; expected 1 or more"
            )
        if self.trainer.threads is not None and self.trainer.threads < 1:
            raise ConfigError(f"trainer.threads: {self.trainer.threads} is not positive")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted names."""
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
            raise ConfigError(f"{where}{name}: no such field{hint}")
        section = is_dataclass(defaults[name])
        built[name] = _build(type(defaults[name]), value, f"{where}{name}.") if section else value
    return kind(**built)
