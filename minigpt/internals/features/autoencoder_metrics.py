"""Metrics of a sparse autoencoder: sparsity, reconstruction, and the model's loss with the reconstruction."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import Tokens, tokens_of, windows
from minigpt.internals.access.names import STREAM
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.features.autoencoder import Autoencoder
from minigpt.internals.features.neurons import AT_ONCE, Contexts, direct_effect, top_contexts, vocabulary_result
from minigpt.model.precision import widen
from minigpt.terminal import progress

LOGITS_AT_ONCE = 2**24


def judge_autoencoder(
    study: Access, autoencoder: Autoencoder, *, text: str | Tensor | Tokens | None = None, limit: int | None = None
) -> tuple[Result, Result]:
    """Compute the standard metrics of an autoencoder, and how often each feature fires.

        explained variance    1 - sum |y - reconstruction|^2 / sum |y - mean|^2
        loss recovered        (loss ablated - loss reconstructed) / (loss ablated - loss clean)
        KL recovered          (KL ablated - KL reconstructed) / KL ablated, with KL(clean output || output)

    Ablated: the activation is set to zero. Reconstructed: the activation is replaced by its reconstruction.

    Args:
        study: the study of the model.
        autoencoder: an autoencoder trained on this model.
        text: text to evaluate on; None: the validation split of the run's corpus.
        limit: maximum number of tokens.

    Returns:
        The metrics (axis figure): features per token (L0), the fractions above, losses and KL in nats per token (none
        for a block_size of 1), the fraction of dead features; and the fraction of tokens at which each feature fires
        (axis feature).
    """
    tokens, width = tokens_of(study, text), study.config.block_size
    rows = max(1, min(AT_ONCE // width, LOGITS_AT_ONCE // (width * study.model.vocab_size)))
    edits = (autoencoder.edits(), {autoencoder.target: 0.0})
    fired = torch.zeros(autoencoder.d_sae, dtype=torch.float64)
    nats, kl = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    first_moment: Tensor | float = 0.0
    square = missed = 0.0
    seen = predicted = 0
    with progress("evaluating", min(limit or len(tokens), len(tokens)), "tokens") as bar:
        for begin, ids in windows(tokens, width, rows, limit):
            logits, cache = study.run_with_cache(ids, [autoencoder.site, autoencoder.target])
            features = autoencoder.features(cache[autoencoder.site])
            aim = cache[autoencoder.target].flatten(0, 1).flatten(1).double()
            made = autoencoder.decode(features).flatten(0, 1).double()
            fired += (features > 0).flatten(0, 1).double().sum(0).cpu()
            first_moment = first_moment + aim.sum(0)
            square += float(aim.square().sum())
            missed += float((aim - made).square().sum())
            seen += len(aim)
            if ids.shape[1] > 1:
                changed = []
                for edit in edits:
                    with study.hooks(edit):
                        changed.append(study.logits(ids))
                outputs = [logits.log_softmax(-1) for logits in map(widen, (logits, *changed))]
                targets = ids[:, 1:].to(logits.device)
                nats += torch.stack([_nats(output, targets) for output in outputs]).cpu()
                kl += torch.stack([_kl(outputs[0], output) for output in outputs[1:]]).cpu()
                predicted += targets.numel()
            bar.update(begin + ids.numel())
    mean = torch.as_tensor(first_moment) / seen
    variance = square - seen * float(mean.square().sum())
    figures = {
        "features per token (L0)": float(fired.sum()) / seen,
        "explained variance": 1 - _share(missed, variance),
        "dead features": float((fired == 0).double().mean()),
    }
    if predicted:  # none in a context of one token
        clean, reconstructed, ablated = (nats / predicted).tolist()
        far, further = (kl / predicted).tolist()
        figures |= {
            "loss recovered": _share(ablated - reconstructed, ablated - clean),
            "KL recovered": _share(further - far, further),
            "loss clean": clean,
            "loss reconstructed": reconstructed,
            "loss ablated": ablated,
            "KL reconstructed": far,
            "KL ablated": further,
        }
    title = f"{autoencoder.kind} {'transcoder' if autoencoder.transcodes else 'autoencoder'} at {autoencoder.target}"
    density = fired / seen
    quarters = torch.quantile(density, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    shares = {"tokens": seen, **dict(zip(("lower quartile", "median", "upper quartile"), quarters, strict=True))}
    return (
        Result(title, np.array(list(figures.values())), (Axis("figure", list(figures)),), "", {"tokens": seen}),
        Result(
            f"feature density at {autoencoder.site}",
            density.numpy(),
            (Axis("feature", [str(feature) for feature in range(len(density))]),),
            "share of tokens",
            shares,
        ),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _nats(output: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(output[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum").double()


def _kl(clean: Tensor, changed: Tensor) -> Tensor:
    """KL(clean || changed), summed over all positions except the last, which has no target."""
    return (clean.exp() * (clean - changed))[:, :-1].double().sum()


def feature_contexts(
    study: Access,
    autoencoder: Autoencoder,
    k: int = 10,
    *,
    text: str | Tensor | Tokens | None = None,
    limit: int | None = None,
) -> Contexts:
    """Find the k tokens at which each feature is largest, with their contexts; see `top_contexts`."""
    found = top_contexts(study, autoencoder.site, k, text=text, limit=limit, encode=autoencoder.features)
    found.axes = (Axis("feature", found.axes[0].labels), found.axes[1])
    return found


def feature_effect(study: Access, autoencoder: Autoencoder, feature: int) -> Result:
    """Direct effect of a feature with value 1 on the logits: its decoder row times the unembedding.

    Raises ConfigError for an unknown feature, or if the target is not the residual stream or a term added to it.
    """
    if study.table[autoencoder.target].axes != STREAM:
        raise ConfigError(f"{autoencoder.target}: not part of the residual stream, so features have no direct effect")
    if not 0 <= feature < autoencoder.d_sae:
        raise ConfigError(f"feature {feature}: expected 0 .. {autoencoder.d_sae - 1}")
    effect = direct_effect(study, autoencoder.W_dec[feature])
    return vocabulary_result(study, f"direct effect of feature {feature} at {autoencoder.target}", effect)
