"""The verbs that look inside a model. Each opens a run, asks one question and prints the answer, or --json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.cli.arguments import add_device, make_parser, parse, print_json, run_or_latest, split_positional
from minigpt.errors import ConfigError
from minigpt.terminal import notice

if TYPE_CHECKING:
    from minigpt.internals.access.result import Result
    from minigpt.internals.study import Study


def study_parser(verb: str, function: Any, positional: str = "[RUN]") -> Any:
    """A parser with what all these verbs take."""
    parser = make_parser(f"minigpt {verb}", function.__doc__ or "", positional)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def open_study(path: str | None, values: Any) -> Study:
    """The study of a run, or of the one trained last."""
    from minigpt.checkpoint.checkpoint import load
    from minigpt.internals.study import Study
    from minigpt.model.device import pick_device

    return Study(load(run_or_latest(path), device=pick_device(values.device, float64=True)))


def show(values: Any, *results: Result) -> None:
    """Print results for a person, or with --json one object for a program: a list where there are several."""
    if values.json:
        made = [result.to_dict() for result in results]
        print_json(made[0] if len(made) == 1 else made)
    else:
        print("\n\n".join(str(result) for result in results))


def check_output(path: str | None, *endings: str) -> None:
    """Raise ConfigError, before anything is computed, where a file cannot be written under that name."""
    if path is None:
        return
    if Path(path).suffix not in endings:
        known = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise ConfigError(f"--output {path}: expected a name that ends in {known}")
    if not (folder := Path(path).parent).is_dir():
        raise ConfigError(f"--output {path}: there is no folder {folder}; make it, or give another name")


def inspect(argv: list[str]) -> None:
    """Write a page about what a model does with a text: minigpt inspect RUN "text" -o report.html. One file that opens
    in any browser, offline. --json prints the page's data instead.
    """
    path, rest = split_positional(argv)
    text, rest = split_positional(rest)
    parser = study_parser("inspect", inspect, "RUN TEXT")
    parser.add_argument("--text", type=str | None, default=None, help="the text, where it is not given after RUN")
    parser.add_argument("-o", "--output", type=str, default="report.html", help="the file to write: .html or .json")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of the text that the page shows")
    values = parse(parser, rest)
    text = text if values.text is None else values.text
    if path is None or text is None:
        raise ConfigError('inspect: expected a run and a text, such as minigpt inspect runs/NAME "To be, or not to be"')
    if values.tokens < 1:
        raise ConfigError(f"--tokens {values.tokens}: expected 1 or more")
    if not values.json:
        check_output(values.output, ".html", ".json")
    began = time.perf_counter()
    study = open_study(path, values)
    made = study.report(text, most=values.tokens)
    if values.json:
        print_json(made.data, allow_nan=False)
        return
    file = made.save(values.output)
    size = file.stat().st_size / 1e3
    print(f"{file}: {size:,.0f} kB, made in {time.perf_counter() - began:.1f} s; open it in any browser")


def dynamics(argv: list[str]) -> None:
    """Draw how the inside of a model changed while it trained: minigpt dynamics RUN. From what a run with
    --internals.every wrote; --checkpoints measures its saved checkpoints instead.
    """
    path, rest = split_positional(argv)
    parser = study_parser("dynamics", dynamics)
    parser.add_argument("--checkpoints", action="store_true", help="measure the saved checkpoints, now")
    parser.add_argument("-o", "--output", type=str | None, default=None, help="write a page with the curves: FILE.html")
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


def heads(argv: list[str]) -> None:
    """Say what each attention head does, and what it is worth: minigpt heads RUN. Scores from 0 to 1 on random tokens
    that repeat, or on --text; the last column is the change of loss when the head is taken away.
    """
    path, rest = split_positional(argv)
    parser = study_parser("heads", heads)
    parser.add_argument("--text", type=str | None, default=None, help="measure on this text; null: on repeated tokens")
    parser.add_argument("--kinds", type=str | None, default=None, help="such as previous,induction; null: all")
    parser.add_argument("--causal", type=bool, default=True, help="take each head away and measure the loss")
    parser.add_argument("--offset", type=int, default=2, help="tokens back, for the kind offset")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    values = parse(parser, rest)
    settings = {"causal": values.causal, "offset": values.offset, "seed": values.seed}
    if values.kinds is not None:
        settings["kinds"] = values.kinds
    found = open_study(path, values).heads(values.text, **settings)
    if values.json:
        print_json(found.table().to_dict())
    else:
        print(found)


def patch(argv: list[str]) -> None:
    """Find where the difference between two texts is carried: minigpt patch RUN --clean A --corrupted B --answer X. The
    model reads B, with one activation after another as it is in A; told is how the answer's logit changes.
    """
    path, rest = split_positional(argv)
    parser = study_parser("patch", patch)
    parser.add_argument("--clean", type=str, help="the text after which the answer is due")
    parser.add_argument("--corrupted", type=str, help="one of as many tokens, after which it is not")
    parser.add_argument("--answer", type=str, help="one token")
    parser.add_argument("--versus", type=str | None, default=None, help="another, whose logit is subtracted")
    parser.add_argument("--position", type=int, default=-1, help="after which token the answer is due")
    parser.add_argument(
        "--at",
        type=str,
        default="resid_pre",
        help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v or pattern",
    )
    parser.add_argument("--by", type=str | None, default=None, help="head, pos or head,pos, beside the layer")
    parser.add_argument("--guess", action="store_true", help="guess by gradient, beside the exact values")
    values = parse(parser, rest)
    for name in ("clean", "corrupted", "answer"):
        if getattr(values, name) is None:
            raise ConfigError(f"--{name}: not given; patch needs --clean TEXT --corrupted TEXT --answer TOKEN")
    from minigpt.internals.causal.effect import logit_difference

    study = open_study(path, values)
    metric = logit_difference(values.answer, values.versus, values.position)
    way = study.attribution_patch if values.guess else study.patch
    show(values, way(values.clean, values.corrupted, metric, values.at, values.by))


__all__ = ["check_output", "open_study", "parse", "show", "split_positional", "study_parser"]
