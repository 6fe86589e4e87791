"""The verb heads: scores and ablation effects of attention heads."""

from __future__ import annotations

from minigpt.cli.arguments import parse, print_json, split_positional
from minigpt.cli.study.opening import open_study, study_parser


def heads(argv: list[str]) -> None:
    """Score attention heads (previous token, induction, ...): minigpt heads RUN. Scores are from 0 to 1, on repeated
    random tokens or on --text; the last column is the loss increase, in nats, when the head is ablated.
    """
    path, rest = split_positional(argv)
    parser = study_parser("heads", heads)
    parser.add_argument(
        "--text", type=str | None, default=None, help="text to measure on; null: repeated random tokens"
    )
    parser.add_argument(
        "--kinds", type=str | None, default=None, help="kinds of scores, such as previous,induction; null: all"
    )
    parser.add_argument("--causal", type=bool, default=True, help="ablate each head and measure the loss increase")
    parser.add_argument("--offset", type=int, default=2, help="kind offset: how many tokens back")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random tokens")
    values = parse(parser, rest)
    settings = {"causal": values.causal, "offset": values.offset, "seed": values.seed}
    if values.kinds is not None:
        settings["kinds"] = values.kinds
    found = open_study(path, values).heads(values.text, **settings)
    if values.json:
        print_json(found.table().to_dict())
    else:
        print(found)
