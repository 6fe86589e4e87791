"""The verb dynamics: head scores and ablations over training."""

from __future__ import annotations

from pathlib import Path

from minigpt.cli.arguments import parse, print_json, run_or_latest, split_positional
from minigpt.cli.study.opening import check_output, study_parser
from minigpt.terminal import notice


def dynamics(argv: list[str]) -> None:
    """Show head scores and ablations over training: minigpt dynamics RUN. Uses the snapshots of a run trained with
    --internals.every; --checkpoints measures the saved checkpoints instead.
    """
    path, rest = split_positional(argv)
    parser = study_parser("dynamics", dynamics)
    parser.add_argument("--checkpoints", action="store_true", help="measure the saved checkpoints now")
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="write the curves to an HTML page: FILE.html"
    )
    values = parse(parser, rest)
    check_output(values.output, ".html")
    from minigpt.durable import write_text
    from minigpt.internals.dynamics.curves import page
    from minigpt.internals.dynamics.series import lines, of_checkpoints, of_run, series
    from minigpt.model.device import pick_device

    run = run_or_latest(path)
    if values.checkpoints:
        found = series(list(of_checkpoints(run, pick_device(values.device, float64=True))))
    else:
        found = of_run(run)
    if values.json:
        print_json({kind: result.to_dict() for kind, result in found.items()})
    elif values.output is None:
        print(lines(found))
    if values.output is not None:
        write_text(Path(values.output), page(f"Inside {run} while it trained", found))
        notice(f"{values.output}: open it in any browser")
