"""Train a tuned lens: for each place the affine map whose prediction is closest to the model's output.

    loss = mean over tokens of KL(model's output || unembed(norm(A h + b)))

Belrose et al. 2023, arXiv 2303.08112, with points after each block; here also between attention and MLP. The model is
frozen. The maps of all points train together, from the same forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import Tokens, draws, tokens_of
from minigpt.internals.attribution.decomposition import points
from minigpt.internals.attribution.translators import Translators, fingerprint, saved_lens, translated
from minigpt.model.explicit import explicit_norm
from minigpt.model.precision import widen
from minigpt.terminal import notice, progress


def train_tuned_lens(
    study: Access,
    text: str | Sequence[int] | Tensor | Tokens | None = None,
    *,
    steps: int = 120,
    tokens: int = 2048,
    learning_rate: float = 3e-3,
    seed: int = 0,
    save: bool = True,
) -> Translators:
    """Train a tuned lens, with a progress bar. Ctrl-C stops the training and keeps the lens trained so far.

    Args:
        study: the study of the model.
        text: text to train on, of any length; None: the training split of the run's corpus.
        steps: number of Adam steps; the learning rate decays linearly to 0.
        tokens: tokens per step.
        learning_rate: initial learning rate.
        seed: seed of the random windows.
        save: write the lens to the run folder, where `tuned_lens` finds it.

    Raises:
        ConfigError: a number is not positive, or `save` is set and the study has no run.
    """
    for name, value in (("steps", steps), ("tokens", tokens), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ConfigError(f"{name}: {value}; expected a positive number")
    path = saved_lens(study, "tuned") if save else None
    corpus = tokens_of(study, text, "train")
    width = min(study.config.block_size, len(corpus))
    where, last = translated(study), points(study.config)[-1]
    names = [point.name for point in (*where, last)]
    channels, like = study.config.n_embd, widen(study.model.unembed.weight.detach())
    matrices = like.new_zeros(len(where), channels, channels).requires_grad_()  # difference from the identity
    biases = like.new_zeros(len(where), channels).requires_grad_()
    adam = torch.optim.Adam([matrices, biases], learning_rate)
    done, kl = 0, float("nan")
    try:
        with progress("training the tuned lens", steps, "steps") as bar:
            for ids in draws(corpus, width, max(1, tokens // width), seed):
                _, cache = study.run_with_cache(ids, names, stop=True)
                streams = torch.stack([widen(cache[name]).flatten(0, 1) for name in names])  # (places + 1, B T, C)
                kl = _learn(study, streams, matrices, biases)
                for group in adam.param_groups:
                    group["lr"] = learning_rate * (1 - done / steps)
                adam.step()
                done += 1
                bar.update(done, f"KL {kl:.3f}")
                if done == steps:
                    break
    except KeyboardInterrupt:
        if not done:
            raise
        notice(f"stopped after {done} of {steps} steps; the lens trained so far is kept")
    identity = torch.eye(channels)
    lens = Translators(
        "tuned",
        {point.name: identity + matrix.detach().cpu() for point, matrix in zip(where, matrices, strict=True)},
        {point.name: bias.detach().cpu().clone() for point, bias in zip(where, biases, strict=True)},
        fingerprint(study.model),
        {"steps": done, "tokens": tokens, "learning_rate": learning_rate, "seed": seed, "kl": kl},
    )
    if path is not None:
        lens.save(path)
    return lens


def _learn(study: Access, streams: Tensor, matrices: Tensor, biases: Tensor) -> float:
    """Set the gradients of all maps and return their mean KL. One point at a time, to hold one set of logits only."""
    norm, unembed = study.model.trunk.norm, study.model.unembed

    def says(stream: Tensor) -> Tensor:  # (B T, C) -> (B T, V)
        return widen(unembed(explicit_norm(norm, stream.to(unembed.weight.dtype)))).log_softmax(-1)

    with torch.no_grad():
        output = says(streams[-1])  # (B T, V)
    matrices.grad, biases.grad = torch.zeros_like(matrices), torch.zeros_like(biases)
    total = 0.0
    for place, stream in enumerate(streams[:-1]):
        with torch.enable_grad():
            matrix, bias = matrices[place].detach().requires_grad_(), biases[place].detach().requires_grad_()
            read = says(stream + stream @ matrix.T + bias)
            loss = F.kl_div(read, output, reduction="batchmean", log_target=True)
        matrices.grad[place], biases.grad[place] = torch.autograd.grad(loss, (matrix, bias))
        total += float(loss.detach())
    return total / len(matrices)
