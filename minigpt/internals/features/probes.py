"""Linear probes: what can be decoded linearly from an activation, layer by layer.

    study.probe(texts, ["noun", "verb", ...])                      what is known after each block
    study.probe(texts, lengths, "resid_post", position=None)       numbers instead of classes, from the mean over tokens

A probe that scores well shows that the information is there, not that the model uses it. The same probe on shuffled
labels says how much of a score is the probe's own doing (Hewitt & Liang 2019, arXiv 1909.03368).
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
    """Weight (D, K) and bias (K) that minimise mean((x w + b - y)^2) + l2 |w|^2, in closed form.

        w = (X'X / n + l2 I)^-1 X'Y / n    with X and Y centred

    Args:
        x: (N, D).
        y: (N, K).
        l2: the penalty; 0 gives least squares of the smallest norm.
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
    """Weight (D, K) and bias (K) that minimise mean cross-entropy + l2 / 2 |w|^2, by L-BFGS.

    Args:
        x: (N, D), in float64 for an exact optimum.
        labels: (N) from 0 to classes - 1.
        classes: K.
        l2: the penalty; the bias has none.
        steps: at most this many.
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
    """(D, K): a column a class, or one for a number; D is the activation flattened."""
    bias: Tensor
    """(K)"""
    classes: list[str] | None
    """What the columns stand for; None where a number is read."""

    def read(self, x: Tensor) -> Tensor:
        """Class numbers (N), or numbers (N), of activations (N, ...)."""
        out = x.flatten(1).to(self.weight) @ self.weight + self.bias
        return out[:, 0] if self.classes is None else out.argmax(-1)

    def score(self, x: Tensor, y: Tensor) -> float:
        """Share of classes that are right, or R^2 of numbers: 1 is perfect, 0 no better than the mean."""
        if self.classes is not None:
            return float((self.read(x) == y).double().mean())
        off, spread = (self.read(x) - y).square().sum(), (y - y.mean()).square().sum()
        return float(1 - off / spread.clamp_min(1e-300))


def fit(x: Tensor, y: Tensor, classes: list[str] | None, l2: float) -> Probe:
    """A probe from activations x (N, ...) to class numbers or numbers y (N).

    The activation is centred and scaled as a whole, so that the same penalty means the same in every layer.
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
    """A table of scores, one row an activation; the probes themselves are in `probes`, by full name."""

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
    """How well a property of texts can be read off activations by a linear map.

    Args:
        study: whose model reads the texts.
        texts: one an example, of any lengths.
        labels: one per text: strings or booleans are classes (logistic regression), numbers are numbers (ridge).
        at: the activations; by default the stream after every block.
        position: of the token that is read; None: the mean over the text.
        l2: the penalty on the weights, where activations have unit variance.
        held_out: share of the texts that the probes never see; of a class, as near as can be.
        seed: which ones, and how labels are shuffled for the control.

    Returns:
        For each activation the score on the texts it was fitted on, on the held-out ones, and the held-out score of the
        control, fitted to shuffled labels: accuracy of classes, R^2 of numbers. A note tells the score of always
        answering the commonest class, or the mean.

    Raises:
        DataError: unequal numbers of texts and labels, or too few of them, or one class only.
        ConfigError: an activation without positions, or a share that is none.
    """
    if len(texts) != len(labels):
        raise DataError(f"labels: {len(labels)} for {len(texts)} texts; expected one each")
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
            f"labels: {len(labels)} with {len(set(labels))} different values do not make a training and a held-out "
            "part; give at least a few texts of each of two kinds"
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
        {"without looking": usual, "fitted": len(train), "held out": len(test)},
        probes,
    )


def _split(groups: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out rows, with about the same share of every group held out."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        kept = round(held_out * len(rows))
        test.append(rows[:kept])
        train.append(rows[kept:])
    return torch.cat(train), torch.cat(test)
