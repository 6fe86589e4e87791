"""Looking at the model while it trains: validation and samples. Neither touches training's data or random numbers."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl

from minigpt.data.batches import ValidationWindows
from minigpt.durable import write_text
from minigpt.errors import ConfigError, DataError
from minigpt.evaluation.loss import bytes_per_token, evaluate
from minigpt.sampling.config import SamplingConfig
from minigpt.sampling.sampler import Sampler
from minigpt.terminal import notice
from minigpt.tokenizer.base import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.each_step import EachStep, due, sum_over_processes
from minigpt.training.metrics import Metrics
from minigpt.training.module import TrainingModule
from minigpt.training.stopping import Agreement


class Validation(EachStep):
    """Loss on the validation split every `eval.every` steps and at the end: nats a token, perplexity, bits a byte.

    A run that was stopped between a save and the validation due at the same step makes up for it when it goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        windows: ValidationWindows | None,
        tokenizer: Tokenizer,
        agreement: Agreement,
        metrics: Metrics,
        owed_at: int | None,
    ) -> None:
        assert config.model.vocab_size is not None
        self.config, self.windows, self.agreement, self.metrics = config, windows, agreement, metrics
        self.byte_lengths = bytes_per_token(tokenizer.token_bytes(), config.model.vocab_size)
        self.owed_at = owed_at

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self.owed_at is not None:
            self._validate(trainer, pl_module, self.owed_at)

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if due(step, self.config.eval.every, self.config.trainer.max_steps) and not self.agreement.stopping:
            self._validate(trainer, module, step)

    def _validate(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if self.windows is None:
            return
        began = time.monotonic()
        with trainer.precision_plugin.forward_context():  # in the precision that training uses
            result = evaluate(
                module.model,
                self.windows,
                self.byte_lengths,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                reduce=sum_over_processes,
            )
        self.metrics.paused += time.monotonic() - began
        self.metrics.write(
            trainer,
            step,
            {
                "val/loss": result.loss,
                "val/perplexity": result.perplexity,
                "val/bpb": result.bits_per_byte,
                "val/tokens": result.tokens,
                "val/of_tokens": len(self.windows.stream) - 1,
            },
        )
        if trainer.is_global_zero:
            notice(f"step {step}: validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits a byte")


class Samples(EachStep):
    """A sample every `sample.every` steps and at the end, from the same prompt and seed, in samples/step-N.txt."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        tokenizer: Tokenizer,
        agreement: Agreement,
        metrics: Metrics,
        owed_at: int | None,
    ) -> None:
        self.owed_at = owed_at
        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.agreement, self.metrics = agreement, metrics
        self.sampling = SamplingConfig(
            max_new_tokens=config.sample.max_new_tokens, temperature=config.sample.temperature, seed=config.seed
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if self.owed_at is not None:
            self._draw(trainer, pl_module, self.owed_at)

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if due(step, self.config.sample.every, self.config.trainer.max_steps) and not self.agreement.stopping:
            self._draw(trainer, module, step)

    def _draw(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if not trainer.is_global_zero or not self.sampling.max_new_tokens:
            return
        began = time.monotonic()
        prompt = self.config.sample.prompt
        try:
            [[sample]] = Sampler(module.model, self.tokenizer, self.sampling).generate(prompt)
            text = prompt + sample.text
        except (ConfigError, DataError) as error:  # a character that the corpus lacks: no reason to stop
            text = f"(no sample: {error})"
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        write_text(folder / f"step-{step:08d}.txt", text)
        self.metrics.paused += time.monotonic() - began
