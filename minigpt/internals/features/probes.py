"""Linear probes: what can be decoded linearly from an activation, layer by layer.

    study.probe(texts, ["noun", "verb", ...])                      classification after each block
    study.probe(texts, lengths, "resid_post", position=None)       regression from the mean over tokens

A high score shows that the activation contains the information, not that the model uses it. A control probe trained on
shuffled labels shows how much of the score is due to the probe itself (Hewitt & Liang 2019, arXiv 1909.03368).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.internals.access.access import Access
from minigpt.internals.access.corpus import gather, site_of
from minigpt.internals.access.names import Names, select
from minigpt.internals.access.result import Axis, Result
from minigpt.internals.access.text import Text


def ridge(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Ridge regression: weight (D, K) and bias (K) that minimise mean((x w + b - y)^2) + l2 |w|^2, in closed form.

        w = (X'X / n + l2 I)^-1 X'Y / n    with X and Y centred

    Args:
        x: inputs (N, D).
        y: targets (N, K).
        l2: penalty; 0 gives the minimum-norm least-squares solution.
    """
    middle, mean = x.mean(0), y.mean(0)
    centred, target = x - middle, y - mean
    if l2 == 0:
        weight = torch.linalg.pinv(centred) @ target
    else:
        square = centred.T @ centred / len(x) + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(square, centred.T @ target / len(x))
    return weight, mean - middle @ weight


def logistic(x: Tensor, labels: Tensor, classes: int, l2: float, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Logistic regression: weight (D, K) and bias (K) that minimise mean cross-entropy + l2 / 2 |w|^2, by L-BFGS.

    Args:
        x: inputs (N, D); use float64 for an exact optimum.
        labels: class numbers (N), from 0 to classes - 1.
        classes: K, the number of classes.
        l2: penalty on the weight; the bias has none.
        steps: maximum number of L-BFGS iterations.
    """
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


@dataclass
class Probe:
    """A fitted probe of one activation."""

    weight: Tensor
    """(D, K): one column per class, or one column for regression; D is the size of the flattened activation."""
    bias: Tensor
    """(K)"""
    classes: list[str] | None
    """Class names of the columns; None for regression."""

    def read(self, x: Tensor) -> Tensor:
        """Predict class numbers (N), or values (N), from activations (N, ...)."""
        out = x.flatten(1).to(self.weight) @ self.weight + self.bias
        return out[:, 0] if self.classes is None else out.argmax(-1)

    def score(self, x: Tensor, y: Tensor) -> float:
        """Accuracy, or R^2 for regression: 1 is perfect, 0 is no better than predicting the mean."""
        if self.classes is not None:
            return float((self.read(x) == y).double().mean())
        off, spread = (self.read(x) - y).square().sum(), (y - y.mean()).square().sum()
        return float(1 - off / spread.clamp_min(1e-300))


def fit(x: Tensor, y: Tensor, classes: list[str] | None, l2: float) -> Probe:
    """Fit a probe that predicts class numbers or values y (N) from activations x (N, ...).

    The activation is centred and scaled by one factor, so that the penalty has the same meaning in every layer.
    """
    rows = x.flatten(1).double()
    middle = rows.mean(0)
    scale = (rows - middle).square().mean().sqrt().clamp_min(1e-12)
    even = (rows - middle) / scale
    if classes is None:
        weight, bias = ridge(even, y.double()[:, None], l2)
    else:
        weight, bias = logistic(even, y, len(classes), l2)
    weight = weight / scale
    return Probe(weight, bias - middle @ weight, classes)


@dataclass(repr=False)
class Probed(Result):
    """A table of scores with one row per activation. `probes` holds the fitted probes by full name."""

    probes: dict[str, Probe] = field(default_factory=dict)


def probe(
    study: Access,
    texts: Sequence[Text],
    labels: Sequence[str] | Sequence[float],
    at: Names = "resid_post",
    *,
    position: int | None = -1,
    l2: float = 0.01,
    held_out: float = 0.25,
    seed: int = 0,
) -> Probed:
    """Fit a linear probe on each activation to predict a property of texts.

    Args:
        study: whose model reads the texts.
        texts: one an example, of any lengths.
        labels: one per text: strings or booleans are classes (logistic regression), numbers are numbers (ridge).
        at: the activations; by default the stream after every block.
        position: position of the token to take; None: the mean over the text.
        l2: penalty on the weights, for activations of unit variance.
        held_out: fraction of the texts to hold out for evaluation, stratified by class.
        seed: seed of the split and of the shuffled labels.

    Returns:
        For each activation three scores: on the texts it was fitted on, on the held-out texts, and the held-out score
        of the control probe, which was fitted on shuffled labels. Scores are accuracy or R^2. A note gives the score of
        always predicting the most common class, or the mean.

    Raises:
        DataError: the numbers of texts and labels differ, there are too few, or there is only one class.
        ConfigError: an activation without positions, or `held_out` outside (0, 1).
    """
    if len(texts) != len(labels):
        raise DataError(f"labels: {len(labels)} labels for {len(texts)} texts; expected one per text")
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out: {held_out} is not between 0 and 1")
    numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    classes = None if numbers else sorted({str(label) for label in labels})
    if classes is None:
        y = torch.tensor(labels, dtype=torch.float64)
        groups = torch.zeros(len(y), dtype=torch.int64)
    else:
        y = groups = torch.tensor([classes.index(str(label)) for label in labels])
    train, test = _split(groups, held_out, seed)
    if len(train) < 2 or len(test) < 2 or float(y.double().std()) == 0:
        raise DataError(
            f"labels: {len(labels)} labels with {len(set(labels))} different values are too few to split into training "
            "and held-out texts; give several texts for each of at least two values"
        )
    names = [site_of(study, name) for name in select(study.config, at)]
    found = gather(study, texts, names, position)
    shuffle = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + 1))
    probes, rows = {}, []
    for name in names:
        x = found[name].cpu()
        probes[name] = made = fit(x[train], y[train], classes, l2)
        control = fit(x[train], y[train][shuffle], classes, l2)
        rows.append([made.score(x[train], y[train]), made.score(x[test], y[test]), control.score(x[test], y[test])])
    usual = 0.0 if classes is None else float((y[test] == y[train].mode().values).double().mean())
    return Probed(
        "linear probes",
        torch.tensor(rows).numpy(),
        (Axis("activation", names), Axis("scored on", ["fitted texts", "held-out", "shuffled labels"])),
        "R^2" if classes is None else "accuracy",
        {"baseline": usual, "fitted": len(train), "held out": len(test)},
        probes,
    )


def _split(groups: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split into training and held-out rows, stratified by group."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        kept = round(held_out * len(rows))
        test.append(rows[:kept])
        train.append(rows[kept:])
    return torch.cat(train), torch.cat(test)
