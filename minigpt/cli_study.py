"""The verbs that look inside a model. Each opens a run, asks one question and prints the answer, or --json."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from minigpt.arguments import latest_run, make_parser, parse, pick_device, split_positional

if TYPE_CHECKING:
    from minigpt.internals.result import Result
    from minigpt.internals.study import Study


def study_parser(verb: str, function: Any, positional: str = "[RUN]") -> Any:
    """A parser with what all these verbs take."""
    parser = make_parser(f"minigpt {verb}", function.__doc__ or "", positional)
    parser.add_argument("--device", type=str, default="cpu", help="where to run: cpu, cuda or mps")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def open_study(path: str | None, values: Any) -> Study:
    """The study of a run, or of the one trained last."""
    from minigpt.checkpoint import load
    from minigpt.internals.study import Study

    return Study(load(path or latest_run(), device=pick_device(values.device)))


def show(values: Any, *results: Result) -> None:
    """Print results for a person, or with --json one object for a program: a list where there are several."""
    if values.json:
        made = [result.to_dict() for result in results]
        print(json.dumps(made[0] if len(made) == 1 else made, ensure_ascii=False))
    else:
        print("\n\n".join(str(result) for result in results))


__all__ = ["open_study", "parse", "show", "split_positional", "study_parser"]
