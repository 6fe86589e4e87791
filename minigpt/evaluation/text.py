"""Evaluate a loaded run on its validation split or on any other text."""

from __future__ import annotations

from dataclasses import replace

from minigpt.data.batches import ValidationWindows, validation_windows
from minigpt.data.config import CleanConfig, DataConfig
from minigpt.data.prepare import prepare
from minigpt.data.shards import Corpus
from minigpt.errors import ConfigError, DataError
from minigpt.evaluation.loss import Evaluation, byte_lengths, evaluate
from minigpt.sampling.run import Run
from minigpt.terminal import progress
from minigpt.tokenizer.config import TokenizerConfig


def corpus_of(run: Run, folder: str | None = None) -> Corpus:
    """Open the corpus that a run was trained on; prepare it again if necessary.

    Args:
        run: a run from `minigpt.load`.
        folder: folder of prepared corpora; None: the folder used in training.

    Raises ConfigError if the model was not trained with minigpt, and DataError if the text has changed.
    """
    if not run.config:
        raise ConfigError(f"{run.path}: not trained with minigpt, so it has no corpus; give --data.source FILE")
    values = dict(run.config["data"])
    data = DataConfig(**{**values, "clean": CleanConfig(**values["clean"])})
    if folder is not None:
        data = replace(data, folder=folder)
    then = run.state.get("corpus")
    corpus = prepare(data, TokenizerConfig(**run.config["tokenizer"]), trained_on=then)
    if then != corpus.hash:  # checked before the tokenizers, because another text can give another tokenizer
        raise DataError(
            f"data.source: {data.source} has changed since {run.path} was trained on it (hash of its tokens: now "
            f"{corpus.hash[:12]}, then {str(then)[:12]}); restore it, or give the text with --data.source FILE"
        )
    corpus.check_tokenizer(run.tokenizer)
    return corpus


def evaluate_run(
    run: Run,
    data: DataConfig | None = None,
    block_size: int | None = None,
    limit_tokens: int | None = None,
    folder: str | None = None,
) -> tuple[Evaluation, str]:
    """Loss of a run's model over non-overlapping windows.

    Args:
        run: from `minigpt.load`.
        data: a text to measure on, whole; None: the validation split of the run's own corpus.
        block_size: tokens per window; None: the model's.
        limit_tokens: measure on this many evenly spaced tokens; None: on all.
        folder: where the run's own corpus is kept; None: where it was when the run was trained.

    Returns:
        The evaluation, and what it was measured on, in words.

    Raises:
        ConfigError: no text is given and the folder was not written by a training run.
    """
    window = block_size or run.model.config.block_size
    if window > run.model.config.block_size:
        raise ConfigError(
            f"--block_size: {window} is more than the model's block_size of {run.model.config.block_size}"
        )
    if window < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise ConfigError(f"--block_size {window}, --tokens {limit_tokens}: expected positive numbers")
    if data is not None:
        corpus = prepare(replace(data, val_fraction=0.0), run.tokenizer)
        split, what = "train", data.source
    else:
        corpus = corpus_of(run, folder)
        split, what = "val", f"the validation split of {run.config['data']['source']}"
    stream = corpus.train if split == "train" else corpus.val
    windows: ValidationWindows = validation_windows(stream, window, limit_tokens, run.tokenizer.given_ids)
    lengths = byte_lengths(corpus, split, run.tokenizer, run.model.vocab_size)
    with progress("evaluating", len(windows), "windows") as bar:
        result = evaluate(run.model, windows, lengths, on_rows=bar.update)
    return result, what
