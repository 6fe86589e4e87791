"""Fit a Jacobian lens: the mean dependence of the final stream on the stream at each place.

    J = mean over texts and tokens t of   sum over t' >= t of   d last(t') / d stream(t)
    uncentred: unembed(norm(J h))         centred: unembed(norm(J (h - mean h) + mean last))

Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models". The lens includes the
effect of a stream on later tokens. Since no token depends on later ones, a backward pass from the sum over all t' gives
one row of J for every point at once; C passes give all rows. The authors use the uncentred form. On a small model with
a small vocabulary it is not informative, because it lacks the mean of the final stream, which makes rare tokens rare.
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
    """Fit a Jacobian lens, with a progress bar. It takes n_embd backward passes.

    Args:
        study: the study of the model.
        text: text to average over, of any length; None: the training split of the run's corpus.
        centred: subtract and add the means over that text; False: J h only, as the authors do.
        tokens: number of tokens to average over, in context windows at random positions of the text.
        seed: seed of the random windows.
        save: write the lens to the run folder, where `jacobian_lens` finds it.

    Raises:
        ConfigError: `tokens` is not positive, or `save` is set and the study has no run.
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
    """Edit that starts the autograd graph at the embedding, so that no gradients of parameters are computed."""
    return embed.detach().requires_grad_()
