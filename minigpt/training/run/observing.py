"""Validation and samples during training; neither changes the training data order or random numbers."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor

from minigpt.checkpoint.runs import Best
from minigpt.data.batches import ValidationWindows
from minigpt.durable import write_text
from minigpt.errors import ConfigError, DataError
from minigpt.evaluation.loss import evaluate
from minigpt.model.gpt import GPT
from minigpt.sampling.sampler import Sampler
from minigpt.sampling.settings.config import SamplingConfig
from minigpt.terminal import notice
from minigpt.tokenizer.base import Tokenizer
from minigpt.training.config import TrainConfig
from minigpt.training.recipe.reduction import sum_over_processes
from minigpt.training.recipe.sharding import plain
from minigpt.training.run.agreement import Agreement
from minigpt.training.run.checkpoints import Checkpoints
from minigpt.training.run.each_step import EachStep, due
from minigpt.training.run.metrics import Metrics
from minigpt.training.run.module import TrainingModule
from minigpt.training.run.standing import Standing


class Validation(EachStep):
    """Loss on the validation split every `eval.every` steps and at the end: nats per token, perplexity, bits per byte.

    At each new lowest loss, a checkpoint is saved and recorded as the best. After `eval.patience` validations without a
    new lowest loss, the run ends. If a run was stopped after a save but before the validation due at the same step, it
    runs that validation when it resumes.

    Args:
        standing: state of validation at the step that the run resumes from.
        owed_at: the step whose validation is missing; None if none is.
    """

    def __init__(
        self,
        config: TrainConfig,
        windows: ValidationWindows | None,
        byte_lengths: Tensor,
        agreement: Agreement,
        metrics: Metrics,
        checkpoints: Checkpoints,
        standing: Standing,
        owed_at: int | None,
    ) -> None:
        assert config.model.vocab_size is not None
        self.checkpoints, self.standing = checkpoints, standing
        self.config, self.windows, self.agreement, self.metrics = config, windows, agreement, metrics
        self.byte_lengths = byte_lengths
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
        with module.evaluated_weights(), trainer.precision_plugin.forward_context():  # the precision of training
            result = evaluate(
                module.model,
                self.windows,
                self.byte_lengths,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                reduce=sum_over_processes,
                added=module.objective if module.objective.added else None,
            )
        self.metrics.pause("validation", time.monotonic() - began)
        self.metrics.write(
            trainer,
            step,
            {
                "val/loss": result.loss,
                "val/perplexity": result.perplexity,
                "val/bpb": result.bits_per_byte,
                "val/tokens": result.tokens,
                "val/of_tokens": len(self.windows.stream) - 1,
                **{f"val/{name}": value for name, value in result.added.items()},
            },
        )
        if trainer.is_global_zero:
            notice(f"step {step}: validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte")
        self.standing = self.standing.after(step, result.loss)
        if self.standing.step == step:
            self.checkpoints.keep_best(trainer, module, Best(step, result.loss))
        if self.standing.exhausted(self.config.eval.patience):
            self.checkpoints.ensure(trainer, module, step)  # so that resuming finds the run finished
            trainer.should_stop = True
            if trainer.is_global_zero:
                notice(
                    f"finished at step {step}: no new best validation loss in {self.standing.since} validations; the "
                    f"best is {self.standing.loss:.4f} at step {self.standing.step}"
                )


class Samples(EachStep):
    """Write a sample to samples/step-N.txt every `sample.every` steps and at the end, with the same prompt and seed.

    The end is the last step, or the step at which early stopping (`eval.patience`) ends the run.
    """

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
        if self.owed_at is not None or trainer.should_stop:  # the missing validation has just ended the run
            self._draw(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if self.agreement.stopping:
            return
        if trainer.should_stop or due(step, self.config.sample.every, self.config.trainer.max_steps):
            self._draw(trainer, module, step)

    def _draw(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        if not self.sampling.max_new_tokens:
            return
        began = time.monotonic()
        with module.evaluated_weights():
            model = plain(module.model)  # collective: gathers sharded weights
            if trainer.is_global_zero and model is not None:
                self._write(model, step)
        self.metrics.pause("sample", time.monotonic() - began)

    def _write(self, model: GPT, step: int) -> None:
        prompt = self.config.sample.prompt
        try:
            [[sample]] = Sampler(model, self.tokenizer, self.sampling).generate(prompt)
            text = prompt + sample.text
        except (ConfigError, DataError) as error:  # such as a character that the corpus lacks; training continues
            text = f"(no sample: {error})"
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        write_text(folder / f"step-{step:08d}.txt", text)
