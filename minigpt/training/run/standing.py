"""The state of validation: best loss, its step, and validations since then.

It follows from the rows of metrics.jsonl up to a step, so that nothing about it needs saving, and a resumed run counts
on from exactly where the one before it was. best.json, beside the rows, says which checkpoint is the best one; where
the two differ, after a kill between them or a damaged checkpoint, the rows are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt.checkpoint.runs import BEST, Best, checkpoints_of, is_whole, read_best, record_best, step_of


@dataclass(frozen=True)
class Standing:
    """The best validation so far."""

    step: int = 0
    """Its step; 0 before the first one."""
    loss: float | None = None
    """Its loss, nats per token."""
    since: int = 0
    """Validations since then."""

    def after(self, step: int, loss: float) -> Standing:
        """With one more validation. A loss that is not finite is never the best; the best step's is, again."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss or step == self.step):
            return Standing(step, loss)
        return replace(self, since=self.since + 1)

    def exhausted(self, patience: int) -> bool:
        """Whether `patience` validations in a row brought no better loss; 0 is endless patience."""
        return 0 < patience <= self.since


def standing_at(step: int, rows: list[dict[str, Any]], recorded: Best | None) -> Standing:
    """The standing after the validations up to and including `step`.

    Args:
        step: where the run goes on from.
        rows: of metrics.jsonl.
        recorded: what best.json says; it counts where the rows no longer know of it.
    """
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row and row["step"] <= step}
    standing = Standing()
    for at, loss in sorted(losses.items()):
        standing = standing.after(at, math.nan if loss is None else loss)
    if recorded is None or recorded.step > step or (standing.loss is not None and standing.loss <= recorded.loss):
        return standing
    return Standing(recorded.step, recorded.loss, sum(at > recorded.step for at in losses))


def settle_best(run: Path, standing: Standing, step: int) -> None:
    """Make best.json say what is true of a run that goes on from `step`.

    A kill may have come between a validation and its record: then the checkpoint of the standing's step is recorded
    now. A record of a later step is of a checkpoint that is damaged or gone, and the run will get there again: it goes.
    """
    recorded = read_best(run)
    if standing.loss is not None and recorded != Best(standing.step, standing.loss):
        found = [path for path in checkpoints_of(run) if step_of(path) == standing.step]
        if found and is_whole(found[0]):
            record_best(run, Best(standing.step, standing.loss))
            return
    if recorded is not None and recorded.step > step:
        (run / BEST).unlink(missing_ok=True)
