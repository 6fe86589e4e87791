"""Train a sparse autoencoder or transcoder on a model's activations.

Activations come from random windows of the training text. They are shuffled within a few thousand tokens and scaled to
unit variance; the scale is folded into the weights at the end. The loss is the fraction of unexplained variance plus
two terms:

    AuxK: dead features predict the reconstruction error (Gao et al. 2024, arXiv 2406.04093)
    jumprelu only: (L0 / k - 1)^2, with a straight-through gradient for the thresholds (Rajamanoharan et al. 2024, arXiv
    2407.14435)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError, DataError, NonFiniteError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import Tokens, draws, site_of, tokens_of
from minigpt.internals.access.names import Names
from minigpt.internals.features.autoencoder import Autoencoder, keep_greatest, keep_greatest_of_batch
from minigpt.internals.features.autoencoder_config import AutoencoderConfig
from minigpt.model.precision import widen
from minigpt.terminal import notice, progress

BATCHES_AT_ONCE = 8  # batches collected and shuffled together
TOKENS_A_FEATURE = 100  # tokens of text per feature; below it a notice is printed
KERNEL = 0.1  # kernel width of the straight-through estimator; pre-activations have a variance of about 1
SILENT = 64  # a feature is dead after this many steps without firing
AUXILIARY = 1 / 32  # weight of the AuxK loss
FASTER = 5.0  # relative learning rate of jumprelu's thresholds, which have to move further than other parameters
SMOOTHING = 0.95  # decay of the running threshold of batchtopk


def _near(pre: Tensor, threshold: Tensor, width: float) -> Tensor:
    """Rectangle kernel K((z - threshold) / width): 1 within half a width of the threshold."""
    return ((pre - threshold).abs() < width / 2).to(pre)


class JumpReLU(torch.autograd.Function):
    """z if z > threshold, else 0. Gradient of the threshold: -(threshold / width) K((z - threshold) / width)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:  # (B, F), (F) -> (B, F)
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        by_threshold = -(threshold / ctx.width) * _near(pre, threshold, ctx.width) * gradient
        return gradient * (pre > threshold), by_threshold.sum(0), None


class Fires(torch.autograd.Function):
    """1 if z > threshold, else 0. Gradient of the threshold: -(1 / width) K((z - threshold) / width); of z: 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:  # (B, F), (F) -> (B, F)
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, (-_near(pre, threshold, ctx.width) / ctx.width * gradient).sum(0), None


class Learner:
    """Trains an autoencoder on pairs of inputs and targets.

    Args:
        site: full name of the input activation.
        target: full name of the activation to reconstruct.
        config: sizes and settings.
        x: first sample of inputs, (N, d_in).
        y: first sample of targets, (N, d_out).
    """

    def __init__(self, site: str, target: str, config: AutoencoderConfig, x: Tensor, y: Tensor) -> None:
        self.config = config
        self.scales = _scale(x), _scale(y)
        x, y = x * self.scales[0], y * self.scales[1]
        d_sae = config.d_sae or 8 * x.shape[1]
        if config.k > d_sae:
            raise ConfigError(f"k: {config.k} is more than the number of features (d_sae {d_sae})")
        generator = torch.Generator().manual_seed(config.seed)
        made = torch.randn(d_sae, y.shape[1], generator=generator).to(y)
        W_dec = made / made.norm(dim=1, keepdim=True)
        if site == target:
            W_enc, b_enc = W_dec.T.clone(), y.new_zeros(d_sae)
        else:
            W_enc = torch.randn(x.shape[1], d_sae, generator=generator).to(x) / math.sqrt(x.shape[1])
            b_enc = -x.mean(0) @ W_enc
        self.model = Autoencoder(site, target, config.kind, config.k, W_enc, b_enc, W_dec, y.mean(0))
        if config.kind == "jumprelu":  # initialize so that about k features per token fire
            pre = self.model.before(x[:4096]).flatten()
            count = max(1, len(pre) * config.k // d_sae)
            self.model.threshold = pre.topk(count).values[-1].clamp_min(KERNEL).expand(d_sae).clone()
        self.parameters = [W_enc, b_enc, W_dec, self.model.b_dec]
        self.parameters += [] if self.model.threshold is None else [self.model.threshold]
        for parameter in self.parameters:
            parameter.requires_grad_()
        groups = [{"params": self.parameters[:4], "times": 1.0}, {"params": self.parameters[4:], "times": FASTER}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=config.learning_rate)
        self.silent = torch.zeros(d_sae, dtype=torch.int64, device=x.device)  # steps since each feature last fired
        self.running: Tensor | None = None  # batchtopk's threshold
        self.done = 0

    def sparse(self, pre: Tensor) -> Tensor:  # (B, d_sae) -> (B, d_sae)
        """Apply the activation function as used in training."""
        if self.config.kind == "topk":
            return keep_greatest(pre, self.config.k)
        if self.config.kind == "batchtopk":
            return keep_greatest_of_batch(pre, self.config.k)
        assert self.model.threshold is not None
        return JumpReLU.apply(pre, self.model.threshold, KERNEL)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Take one optimizer step on x (B, d_in), y (B, d_out); return the unexplained variance fraction and L0."""
        x, y = x * self.scales[0], y * self.scales[1]
        with torch.enable_grad():
            pre = self.model.before(x)
            features = self.sparse(pre)
            error = y - self.model.decode(features)
            missed = error.square().mean()
            loss = missed + self._further(pre, error)
            self.optimizer.zero_grad()
            loss.backward()
        decoder = self.model.W_dec
        assert decoder.grad is not None
        # Decoder rows keep unit length: remove the gradient component along each row.
        decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._schedule() * group["times"]
        self.optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True).clamp_min(1e-12)
            if self.model.threshold is not None:
                self.model.threshold.clamp_(min=0)
            fired = features > 0
            self.silent = torch.where(fired.any(0), 0, self.silent + 1)
            if self.config.kind == "batchtopk" and bool(fired.any()):
                least = features[fired].min()
                self.running = least if self.running is None else SMOOTHING * self.running + (1 - SMOOTHING) * least
        self.done += 1
        return float(missed.detach()), float(fired.sum(1).double().mean())

    def _further(self, pre: Tensor, error: Tensor) -> Tensor:
        """Additional loss terms; see the module docstring."""
        loss = error.new_zeros(())
        if self.model.threshold is not None:
            count = Fires.apply(pre, self.model.threshold, KERNEL).sum(1).mean()
            loss = loss + self.config.sparsity * (count / self.config.k - 1) ** 2
        dead = (self.silent > SILENT).nonzero()[:, 0]
        if len(dead):
            some = keep_greatest(pre[:, dead], max(1, error.shape[1] // 2))
            loss = loss + AUXILIARY * (error.detach() - some @ self.model.W_dec[dead]).square().mean()
        return loss

    def _schedule(self) -> float:
        share = (self.done + 1) / self.config.steps
        return min(1.0, share / 0.05, max(0.0, 1 - share) / 0.2 + 1e-3)

    def finish(self, notes: dict[str, Any]) -> Autoencoder:
        """Return the autoencoder trained so far, with the scales folded into the weights."""
        read, written = self.scales
        model, threshold = self.model, self.model.threshold
        if self.config.kind == "batchtopk":
            least = torch.zeros((), device=model.b_enc.device) if self.running is None else self.running
            threshold = least.expand(model.d_sae)
        return replace(
            model,
            W_enc=model.W_enc.detach() * (read / written),
            b_enc=model.b_enc.detach() / written,
            W_dec=model.W_dec.detach() / model.W_dec.detach().norm(dim=1, keepdim=True).clamp_min(1e-12),
            b_dec=model.b_dec.detach() / written,
            threshold=None if threshold is None else (threshold.detach() / written).clone(),
            notes=notes,
        )


def _scale(x: Tensor) -> float:
    """What makes the variance of x (N, D) one per channel."""
    return 1 / float((x - x.mean(0)).square().mean().sqrt().clamp_min(1e-12))


def train_autoencoder(
    study: Access,
    at: Names,
    target: Names | None = None,
    *,
    config: AutoencoderConfig | None = None,
    text: str | Tensor | Tokens | None = None,
) -> Autoencoder:
    """Train a sparse autoencoder on one activation, or a transcoder from one to another.

    Ctrl-C stops the training and keeps the result so far.

    Args:
        study: the study of the model.
        at: the input activation, such as ("resid_post", 1).
        target: the activation to reconstruct, such as ("mlp_out", 1) from ("ln2.normalized", 1); None: same as `at`.
        config: kind, sizes and steps.
        text: text to run the model on; None: the training split of the run's corpus.

    Returns:
        The autoencoder, with notes on its training: steps, tokens, missed (fraction of unexplained variance, averaged
        over the last steps), l0.

    Raises:
        ConfigError: an activation without positions, or a target that is computed before its input.
        DataError: the text has fewer tokens than features. (A notice is printed if it has few tokens per feature.)
        NonFiniteError: the training diverged.
    """
    config = config or AutoencoderConfig()
    site = site_of(study, at)
    goal = site if target is None else site_of(study, target)
    order = list(study.table)
    if order.index(goal) < order.index(site):
        raise ConfigError(f"target {goal}: computed before {site}; a transcoder needs a target after its input")
    tokens = tokens_of(study, text, "train")
    samples = _samples(study, site, goal, tokens, config)
    learner = Learner(site, goal, config, *next(samples))
    _check_amount(len(tokens), learner.model.d_sae)
    told = [1.0, float(config.k)]
    try:
        with progress(f"{config.kind} on {goal}", config.steps, "steps") as bar:
            while learner.done < config.steps:
                x, y = next(samples)
                for rows in zip(x.split(config.batch), y.split(config.batch), strict=True):
                    if learner.done < config.steps:
                        now = learner.step(*rows)
                        if not math.isfinite(now[0]):
                            raise NonFiniteError(f"{config.kind} on {goal}: training diverged; lower learning_rate")
                        told = [0.95 * before + 0.05 * new for before, new in zip(told, now, strict=True)]
                        bar.update(learner.done, f"unexplained {told[0]:.3f} L0 {told[1]:.1f}")
    except KeyboardInterrupt:
        notice(f"stopped at step {learner.done} of {config.steps}; the result so far is kept")
    figures = {"steps": learner.done, "tokens": learner.done * config.batch, "missed": told[0], "l0": told[1]}
    return learner.finish({**figures, "config": asdict(config)})


def _check_amount(tokens: int, features: int) -> None:
    """Raise DataError for fewer tokens than features, because each token could then get a feature of its own."""
    sensible = TOKENS_A_FEATURE * features
    if tokens < features:
        raise DataError(
            f"text: {tokens:,} tokens for {features:,} features, fewer than one per feature; give a text of "
            f"{sensible:,} tokens or more, or a smaller d_sae"
        )
    if tokens < sensible:
        notice(
            f"text: {tokens:,} tokens for {features:,} features is little, the features may overfit; use at least "
            f"{sensible:,} tokens ({TOKENS_A_FEATURE} per feature), or a smaller d_sae"
        )


def _samples(
    study: Access, site: str, goal: str, tokens: Tokens, config: AutoencoderConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless shuffled batches of inputs (N, d_in) and targets (N, d_out)."""
    width = min(study.config.block_size, len(tokens))
    count = BATCHES_AT_ONCE * config.batch
    generator = torch.Generator().manual_seed(config.seed)
    for ids in draws(tokens, width, -(-count // width), config.seed):
        _, cache = study.run_with_cache(ids, [site, goal], stop=True)
        order = torch.randperm(ids.numel(), generator=generator)[:count].to(study.model.device)
        x, y = (widen(cache[name]).flatten(0, 1).flatten(1)[order] for name in (site, goal))
        yield x, y
