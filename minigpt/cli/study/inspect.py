"""The verb inspect: an HTML report about one text."""

from __future__ import annotations

import time

from minigpt.cli.arguments import parse, print_json, split_positional
from minigpt.cli.study.opening import check_output, open_study, study_parser
from minigpt.errors import ConfigError


def inspect(argv: list[str]) -> None:
    """Write an HTML report about a model on one text: minigpt inspect RUN "text" -o report.html. Attention, logit lens,
    attribution and sampling in one offline file. --json prints the data instead.
    """
    path, rest = split_positional(argv)
    text, rest = split_positional(rest)
    parser = study_parser("inspect", inspect, "RUN TEXT")
    parser.add_argument("--text", type=str | None, default=None, help="the text, if it is not given after RUN")
    parser.add_argument("-o", "--output", type=str, default="report.html", help="file to write: .html or .json")
    parser.add_argument("--tokens", type=int, default=256, help="maximum number of tokens in the report")
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
