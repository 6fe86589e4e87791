"""Fit a Jacobian lens: the mean dependence of the final stream on the stream at each place.

    J = mean over texts and tokens t of   sum over t' >= t of   d last(t') / d stream(t)
    read: unembed(norm(J h))  or, around the means of the stream h and of the last stream,  J (h - mean h) + mean last

Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models". It counts what a stream
does for later tokens too. As no token depends on a later one, a backward pass from the sum over all t' gives a row of J
for every place at once; C passes give all. They read J h alone, which on a small model of few tokens says little: the
mean of the last stream, which makes rare tokens rare, is missing there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import Tokens, draws, tokens_of
from minigpt.internals.attribution.decomposition import points
from minigpt.internals.attribution.translators import Translators, fingerprint, saved_lens, translated
from minigpt.terminal import progress


def fit_jacobian_lens(
    study: Access,
    text: str | Sequence[int] | Tensor | Tokens | None = None,
    *,
    centred: bool = True,
    tokens: int = 1024,
    seed: int = 0,
    save: bool = True,
) -> Translators:
    """Fit one, showing a progress bar. It costs as many backward passes as the stream has channels.

    Args:
        study: of the model.
        text: to average over, of any length; None: the training split of the run's corpus.
        centred: read around the means over the text that is averaged; False: read J h alone, as the authors do.
        tokens: how many of it, in windows of the model's context from anywhere in it.
        seed: of the windows that are drawn.
        save: write it into the run's folder, where `jacobian_lens` finds it.

    Raises:
        ConfigError: a number that is not positive; a study of no run, with save.
    """
    if tokens < 1:
        raise ConfigError(f"tokens: {tokens}; expected a positive number")
    path = saved_lens(study, "jacobian") if save else None
    corpus = tokens_of(study, text, "train")
    width = min(study.config.block_size, len(corpus))
    where, last = translated(study), points(study.config)[-1]
    ids = next(draws(corpus, width, max(1, tokens // width), seed))
    names = [point.name for point in (*where, last)]
    channels = study.config.n_embd
    with study.hooks({"embed": _leaf}):
        _, cache = study.run_with_cache(ids, names, grad=True, stop=True)
    *streams, end = [cache[name] for name in names]
    rows: list[list[Tensor]] = [[] for _ in where]
    with progress("fitting the Jacobian lens", channels, "channels") as bar, torch.enable_grad():
        for channel in range(channels):
            target = end[..., channel].sum()
            gradients = torch.autograd.grad(target, streams, retain_graph=channel + 1 < channels)  # (B, T, C) a place
            for row, gradient in zip(rows, gradients, strict=True):
                row.append(gradient.mean((0, 1)).cpu())
            bar.update(channel + 1)
    matrices = {point.name: torch.stack(row) for point, row in zip(where, rows, strict=True)}
    biases = {}
    if centred:
        mean = end.detach().mean((0, 1)).cpu()
        means = [stream.detach().mean((0, 1)).cpu() for stream in streams]
        biases = {name: mean - matrix @ own for (name, matrix), own in zip(matrices.items(), means, strict=True)}
    notes = {"tokens": ids.numel(), "width": width, "seed": seed, "centred": centred}
    lens = Translators("jacobian", matrices, biases, fingerprint(study.model), notes)
    if path is not None:
        lens.save(path)
    return lens


def _leaf(embed: Tensor, site: object) -> Tensor:
    """Derivatives are asked for of what follows the embedding, and so not of the model's parameters."""
    return embed.detach().requires_grad_()
