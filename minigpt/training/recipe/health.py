"""Detect a run that cannot learn, before its first step and during the first ones.

A gradient of exactly zero leaves loss, speed and utilisation looking healthy to the end. So does a compiler that is
wrong. Each is found here, told by the parameters' names, and ends the run. Under several processes all of
them see the same numbers and decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minigpt.data.batches import IGNORED
from minigpt.errors import NotLearning
from minigpt.training.recipe.reduction import sum_over_processes
from minigpt.training.recipe.sharding import local

FIRST_STEPS = 5  # a parameter whose gradient is zero in all of these is idle; zero-initialised layers take two
PARTS = 4  # the uncompiled step is taken in so many parts: it must not need more memory than the compiled one
# How far a compiled gradient may be from the uncompiled one, in parts of its own norm and of the whole gradient's. The
# second is for gradients that are nothing but rounding, as those of GPT-2's key biases are.
TOLERANCES = {"32-true": (0.01, 1e-4), "bf16-mixed": (0.2, 0.01)}
FLOOR_WITH_DROPOUT = 0.02  # of the whole norm: a smaller gradient may vanish by what is dropped
DROPPED = 4.0  # with dropout, which drops other units, the whole gradients' norms may differ by this factor

Step = Callable[[Tensor, Tensor], Tensor]


def norms_of(tensors: Iterable[Tensor | None]) -> Tensor:
    """Each tensor's norm over all processes, (number of tensors) on the CPU; 0 for None."""
    sums = [torch.zeros(()) if t is None else local(t).detach().float().square().sum().cpu() for t in tensors]
    return sum_over_processes(torch.stack(sums).double()).sqrt()


def not_zero(tensors: Iterable[Tensor | None]) -> Tensor:
    """Which tensors have an entry that is not zero, however small, on any process."""
    counts = [0 if t is None else int(local(t).detach().count_nonzero()) for t in tensors]
    return sum_over_processes(torch.tensor(counts, dtype=torch.float64)) > 0


def mean_loss(loss: Tensor) -> float:
    """The loss over all processes, so that all of them decide the same."""
    total, processes = sum_over_processes(torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)).tolist()
    return total / processes


def check_gradients(model: nn.Module, loss: Tensor) -> None:
    """After a backward pass: every parameter that is trained has a gradient, and not all of them are zero.

    A loss of exactly zero has nothing left to teach.

    Raises:
        NotLearning: naming the parameters.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    if without:
        raise NotLearning(
            f"{listed(without)}: the loss does not depend on these parameters, so they would never change; use them in "
            f"the model's forward, or freeze them with requires_grad_(False)"
        )
    value = mean_loss(loss)
    if value > 0 and not not_zero(parameter.grad for _, parameter in trained).any():
        raise NotLearning(
            f"the gradient of every parameter is exactly zero, though the loss is {value:.4f}: the model would never "
            f"change; {remedy()}"
        )


def check_compiled(
    model: nn.Module, step: Step, batch: tuple[Tensor, Tensor], loss: Tensor, tolerance: tuple[float, float] | None
) -> None:
    """Compare the loss and gradients that a compiled step has left with those of the same step as it is written.

    Args:
        model: with the compiled step's gradients, which are replaced.
        step: the compiled (ids, targets) -> loss.
        batch: ids and targets (B, T), what it was given.
        loss: what it gave.
        tolerance: of TOLERANCES, for the precision; None where dropout draws other numbers, so that only gradients that
            vanish and the whole gradient's norm can be told.

    A gradient that is not finite uncompiled either is left to the step itself, which skips it.

    Raises:
        NotLearning: naming the parameters that differ.
    """
    ids, targets = batch
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    compiled = [parameter.grad for _, parameter in trained]
    for _, parameter in trained:
        parameter.grad = None
    total = torch.zeros((), dtype=loss.dtype, device=loss.device)
    counts = (targets != IGNORED).sum()
    rows = max(1, len(ids) // PARTS)
    with torch.compiler.set_stance("force_eager"):
        for some_ids, some_targets in zip(ids.split(rows), targets.split(rows), strict=True):
            part = step(some_ids, some_targets) * ((some_targets != IGNORED).sum() / counts)
            part.backward()
            total += part.detach()
    eager = [parameter.grad for _, parameter in trained]

    (ours, compiled_any), (theirs, eager_any) = ((norms_of(g), not_zero(g)) for g in (compiled, eager))
    if not theirs.isfinite().all():
        return
    values = [mean_loss(loss), mean_loss(total)]
    whole, expected = (float(norms.square().sum().sqrt()) for norms in (ours, theirs))
    if tolerance is None:
        off = eager_any & ~compiled_any & (theirs > FLOOR_WITH_DROPOUT * expected)
        if not expected / DROPPED <= whole <= expected * DROPPED:
            off |= theirs > 0
        far = False  # the loss differs by what was dropped
    else:
        share, floor = tolerance
        pairs = zip(compiled, eager, strict=True)
        apart = norms_of(None if c is None or e is None else c - e for c, e in pairs)  # one difference at a time
        off = ~(apart <= share * theirs + floor * expected)
        far = not abs(values[0] - values[1]) <= share * abs(values[1])
    wrong = [f"{name} (norm {ours[i]:.3g} for {theirs[i]:.3g})" for i, (name, _) in enumerate(trained) if off[i]]
    if far:
        wrong.append(f"the loss ({values[0]:.4f} for {values[1]:.4f})")
    if wrong:
        raise NotLearning(
            f"the compiled step does not compute what the model says; it differs from the uncompiled one, on the same "
            f"batch, in {listed(wrong)}; give --trainer.compile false, or use another version of torch than "
            f"{torch.__version__}"
        )


class Idle:
    """Finds parameters whose gradient is exactly zero in each of the first steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.moved: Tensor | None = None

    def look(self, model: nn.Module, loss: Tensor) -> None:
        """At each step, between backward and update.

        Raises:
            NotLearning: at step FIRST_STEPS, naming the parameters.
        """
        if self.steps >= FIRST_STEPS:
            return
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        moved = not_zero(parameter.grad for _, parameter in trained)
        self.moved = moved if self.moved is None else self.moved | moved
        self.steps += 1
        idle = [name for (name, _), some in zip(trained, self.moved.tolist(), strict=True) if not some]
        if self.steps == FIRST_STEPS and idle and mean_loss(loss) > 0:
            raise NotLearning(
                f"{listed(idle)}: the gradient was exactly zero in each of the first {FIRST_STEPS} steps; look at what "
                f"stands between these parameters and the loss, or freeze them with requires_grad_(False)"
            )


def remedy() -> str:
    """What to try where nothing is learned."""
    return "lower the learning rates if it was learning before, else try --trainer.compile false and look at the model"


def listed(names: list[str], most: int = 5) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
