"""Detect a run that cannot learn, before its first step and during the first ones.

With gradients of exactly zero, or with a miscompiled step, loss, speed and utilisation can look healthy to the end of a
run. These checks find both, name the parameters, and end the run. With several processes, all of them see the same
numbers and take the same decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minigpt.data.batches import IGNORED
from minigpt.errors import NotLearning
from minigpt.training.recipe.reduction import sum_over_processes
from minigpt.training.recipe.sharding import local

FIRST_STEPS = 5  # a parameter with zero gradient in all of these steps is idle; zero-initialised layers need two steps
PARTS = 4  # the eager step runs in this many parts, so that it needs no more memory than the compiled one
# Allowed difference between compiled and eager gradient of a parameter, as fractions of the parameter's gradient norm
# and of the norm of the whole gradient. The second is for gradients that are only rounding error, such as those of
# GPT-2's key biases.
TOLERANCES = {"32-true": (0.01, 1e-4), "bf16-mixed": (0.2, 0.01)}
FLOOR_WITH_DROPOUT = 0.02  # of the whole norm: with dropout, a smaller gradient may be zero by chance
DROPPED = 4.0  # allowed ratio of compiled and eager gradient norms with dropout, whose masks differ

Step = Callable[[Tensor, Tensor], Tensor]


def norms_of(tensors: Iterable[Tensor | None]) -> Tensor:
    """Norm of each tensor over all processes, shape (number of tensors), on the CPU; 0 for None."""
    sums = [torch.zeros(()) if t is None else local(t).detach().float().square().sum().cpu() for t in tensors]
    return sum_over_processes(torch.stack(sums).double()).sqrt()


def not_zero(tensors: Iterable[Tensor | None]) -> Tensor:
    """Whether each tensor has a nonzero entry on any process; bool, shape (number of tensors)."""
    counts = [0 if t is None else int(local(t).detach().count_nonzero()) for t in tensors]
    return sum_over_processes(torch.tensor(counts, dtype=torch.float64)) > 0


def mean_loss(loss: Tensor) -> float:
    """Mean loss over all processes; the same value on each."""
    total, processes = sum_over_processes(torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)).tolist()
    return total / processes


def check_gradients(model: nn.Module, loss: Tensor) -> None:
    """Check after a backward pass that every trainable parameter has a gradient and that not all gradients are zero.

    Zero gradients are allowed at a loss of exactly zero.

    Raises:
        NotLearning: a check failed; the message names the parameters.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    if without:
        raise NotLearning(
            f"{listed(without)}: the loss does not depend on these parameters, so they would never change; use them in "
            f"the model's forward pass, or freeze them with requires_grad_(False)"
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
    """Compare the loss and gradients of a compiled step with those of the eager step on the same batch.

    Args:
        model: the model with the compiled step's gradients, which are replaced.
        step: the compiled step, (ids, targets) -> loss.
        batch: the step's ids and targets, (B, T) each.
        loss: the compiled step's loss.
        tolerance: entry of TOLERANCES for the precision. None with dropout, whose masks differ: then only vanishing
            gradients and the norm of the whole gradient are compared.

    If the eager gradient is not finite, nothing is compared; the training step skips such a gradient.

    Raises:
        NotLearning: the steps differ; the message names the parameters.
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
        far = False  # the losses differ because the dropout masks differ
    else:
        share, floor = tolerance
        pairs = zip(compiled, eager, strict=True)
        apart = norms_of(None if c is None or e is None else c - e for c, e in pairs)  # one difference at a time
        off = ~(apart <= share * theirs + floor * expected)
        far = not abs(values[0] - values[1]) <= share * abs(values[1])
    wrong = [f"{name} (norm {ours[i]:.3g}, eager {theirs[i]:.3g})" for i, (name, _) in enumerate(trained) if off[i]]
    if far:
        wrong.append(f"the loss ({values[0]:.4f}, eager {values[1]:.4f})")
    if wrong:
        raise NotLearning(
            f"the compiled step is wrong: it differs from the eager step on the same batch in {listed(wrong)}; give "
            f"--trainer.compile false, or use another version of torch than {torch.__version__}"
        )


class Idle:
    """Finds parameters whose gradient is exactly zero in each of the first steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.moved: Tensor | None = None

    def look(self, model: nn.Module, loss: Tensor) -> None:
        """Record nonzero gradients of one step; call between backward pass and optimizer update.

        Raises:
            NotLearning: at step FIRST_STEPS, if a parameter never had a nonzero gradient; the message names it.
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
                f"{listed(idle)}: the gradient was exactly zero in each of the first {FIRST_STEPS} steps; check how "
                f"the loss depends on these parameters, or freeze them with requires_grad_(False)"
            )


def remedy() -> str:
    """Advice for a run that does not learn."""
    return "lower the learning rates if the loss fell before; otherwise try --trainer.compile false and check the model"


def listed(names: list[str], most: int = 5) -> str:
    """Join the first `most` names, and count the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
