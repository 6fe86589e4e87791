"""A run that is ready to train, in a form that can be passed to other processes."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minigpt.data.shards import Corpus
from minigpt.model.gpt import GPT
from minigpt.training.config import TrainConfig
from minigpt.training.run.standing import Standing


@dataclass(frozen=True)
class Objects:
    """What a script passes to a run in its own process; other processes do not get it."""

    model: GPT | None = None
    """Trained in place instead of a new GPT."""
    callbacks: tuple[Any, ...] = ()
    """Lightning callbacks, called after ours."""
    corpus: Corpus | None = None
    """Prepared from the script's documents; None: from config.data."""


@dataclass(frozen=True)
class Job:
    """A run that is ready to be trained."""

    config: TrainConfig
    """Resolved: every field has its number."""
    run: Path
    """runs/NAME."""
    corpus: Path
    """The prepared corpus."""
    start: Path | None
    """The checkpoint to resume from."""
    first_step: int
    """Steps that are done already."""
    owed: tuple[str, ...]
    """What was due at the last step and was cut off: "validation", "sample"."""
    standing: Standing
    """How validation stood at that step."""
    probe: bool = False
    """Trained only to be timed (see budget.py): nothing is said."""

    @property
    def last_step(self) -> int:
        """The step to train to, at most."""
        exhausted = self.standing.exhausted(self.config.eval.patience)
        return self.first_step if exhausted else self.config.trainer.max_steps

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.first_step >= self.last_step and not self.owed

    @property
    def how_to_resume(self) -> str:
        """What to say to who has stopped it."""
        folder = self.config.runs_dir
        where = "" if folder == TrainConfig.runs_dir else f" --runs_dir {shlex.quote(folder)}"
        return f"resume with --run_name {shlex.quote(str(self.config.run_name))} --resume auto{where}"

    @property
    def ending(self) -> str:
        """One line on a run that is finished: why, and how to continue it."""
        if self.first_step >= self.config.trainer.max_steps:
            return f"{self.run}: finished at step {self.first_step}; raise trainer.max_steps to continue"
        return (
            f"{self.run}: finished at step {self.first_step}, after {self.standing.since} validations without a "
            f"better loss than {self.standing.loss:.4f} (step {self.standing.step}); raise eval.patience to continue, "
            f"or set it to 0"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to hand to another process."""
        return {
            "config": self.config.to_dict(),
            "run": str(self.run),
            "corpus": str(self.corpus),
            "start": str(self.start) if self.start else None,
            "first_step": self.first_step,
            "owed": list(self.owed),
            "standing": asdict(self.standing),
            "probe": self.probe,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        """The inverse of to_dict."""
        return cls(
            config=TrainConfig.from_dict(values["config"]),
            run=Path(values["run"]),
            corpus=Path(values["corpus"]),
            start=Path(values["start"]) if values["start"] else None,
            first_step=values["first_step"],
            owed=tuple(values["owed"]),
            standing=Standing(**values["standing"]),
            probe=values["probe"],
        )
