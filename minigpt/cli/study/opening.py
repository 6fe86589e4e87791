"""Shared by the verbs that study a model: parser, opening a run, printing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.cli.arguments import add_device, make_parser, print_json, run_or_latest
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.internals.access.result import Result
    from minigpt.internals.study import Study


def study_parser(verb: str, function: Any, positional: str = "[RUN]") -> Any:
    """A parser with the flags that all these verbs have."""
    parser = make_parser(f"minigpt {verb}", function.__doc__ or "", positional)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def open_study(path: str | None, values: Any) -> Study:
    """The Study of a run, by default of the one trained last."""
    from minigpt.internals.study import Study
    from minigpt.model.device import pick_device
    from minigpt.sampling.run import load

    return Study(load(run_or_latest(path), device=pick_device(values.device, float64=True)))


def show(values: Any, *results: Result) -> None:
    """Print results as text, or with --json as one object (a list if there are several)."""
    if values.json:
        made = [result.to_dict() for result in results]
        print_json(made[0] if len(made) == 1 else made)
    else:
        print("\n\n".join(str(result) for result in results))


def check_output(path: str | None, *endings: str) -> None:
    """Raise ConfigError if --output cannot be written, before anything is computed."""
    if path is None:
        return
    if Path(path).suffix not in endings:
        known = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise ConfigError(f"--output {path}: expected a name that ends in {known}")
    if not (folder := Path(path).parent).is_dir():
        raise ConfigError(f"--output {path}: there is no folder {folder}; make it, or give another name")
