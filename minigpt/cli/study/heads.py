"""The verb heads: what each attention head does."""

from __future__ import annotations

from minigpt.cli.arguments import parse, print_json, split_positional
from minigpt.cli.study.opening import open_study, study_parser


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
