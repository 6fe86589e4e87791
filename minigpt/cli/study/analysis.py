"""The verb of an analysis that a plug-in registered: minigpt NAME RUN TEXT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minigpt.cli.arguments import parse, split_positional
from minigpt.cli.study.opening import open_study, show, study_parser
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.choices import Table


def analyse(analyses: Table, name: str, argv: list[str]) -> None:
    """Run a registered analysis on a text and print its result; its keyword arguments are flags."""
    path, rest = split_positional(argv)
    text, rest = split_positional(rest)
    parser = study_parser(name, analyses[name], "RUN TEXT")
    parser.add_argument("--text", type=str | None, default=None, help="the text, if it is not given after RUN")
    for setting in analyses.settings(name).values():
        parser.add_argument(f"--{setting.name}", type=setting.type or str, default=setting.default)
    values = parse(parser, rest)
    text = text if values.text is None else values.text
    if path is None or text is None:
        raise ConfigError(f'{name}: expected a run and a text, such as minigpt {name} runs/NAME "To be, or not to be"')
    options = {setting: getattr(values, setting) for setting in analyses.settings(name)}
    show(values, analyses[name](open_study(path, values), text, **options))
