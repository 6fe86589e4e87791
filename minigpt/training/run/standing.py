"""The state of validation: best loss, its step, and validations since then.

The state is computed from the rows of metrics.jsonl up to a step, so checkpoints do not store it, and a resumed run
continues the count exactly. best.json records which checkpoint is the best. If both differ (after a kill between the
two writes, or with a damaged checkpoint), metrics.jsonl is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt.checkpoint.runs import BEST, Best, checkpoints_of, is_whole, read_best, record_best, step_of


@dataclass(frozen=True)
class Standing:
    """State of validation at a step: the best result so far and the validations since."""

    step: int = 0
    """Step of the best validation; 0 before the first validation."""
    loss: float | None = None
    """Its loss, nats per token."""
    since: int = 0
    """Number of validations since the best one."""

    def after(self, step: int, loss: float) -> Standing:
        """Return the state after one more validation.

        A loss that is not finite is never the best. A repeated validation of the best step stays the best.
        """
        if math.isfinite(loss) and (self.loss is None or loss < self.loss or step == self.step):
            return Standing(step, loss)
        return replace(self, since=self.since + 1)

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` validations brought no new best loss; always False for 0."""
        return 0 < patience <= self.since


def standing_at(step: int, rows: list[dict[str, Any]], recorded: Best | None) -> Standing:
    """Compute the state of validation after the validations up to and including `step`.

    Args:
        step: the step the run resumes from.
        rows: rows of metrics.jsonl.
        recorded: content of best.json; used if its loss is better than any in the rows.
    """
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row and row["step"] <= step}
    standing = Standing()
    for at, loss in sorted(losses.items()):
        standing = standing.after(at, math.nan if loss is None else loss)
    if recorded is None or recorded.step > step or (standing.loss is not None and standing.loss <= recorded.loss):
        return standing
    return Standing(recorded.step, recorded.loss, sum(at > recorded.step for at in losses))


def settle_best(run: Path, standing: Standing, step: int) -> None:
    """Correct best.json for a run that resumes from `step`.

    If the run was killed between a validation and its record, records the checkpoint of the best step now. Deletes a
    record of a step after `step`: its checkpoint is damaged or gone, and the run will reach that step again.
    """
    recorded = read_best(run)
    if standing.loss is not None and recorded != Best(standing.step, standing.loss):
        found = [path for path in checkpoints_of(run) if step_of(path) == standing.step]
        if found and is_whole(found[0]):
            record_best(run, Best(standing.step, standing.loss))
            return
    if recorded is not None and recorded.step > step:
        (run / BEST).unlink(missing_ok=True)
