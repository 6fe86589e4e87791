"""The verb plan: what a training run will cost."""

from __future__ import annotations

from minigpt.cli.arguments import add_training_settings, fields_of, make_parser, parse, print_json


def plan(argv: list[str]) -> None:
    """Say what training will cost, before any time is spent: minigpt plan --config NAME --model.n_layer 6. Memory,
    operations, tokens, and the time that it takes here and on named GPUs.
    """
    from minigpt.training.config import TrainConfig

    parser = make_parser("minigpt plan", plan.__doc__ or "")
    add_training_settings(parser)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of a device's peak that is assumed")
    parser.add_argument(
        "--measure", type=bool | None, default=None, help="time a few steps here; null: where that is quick"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, argv)
    config = TrainConfig(**fields_of(values, TrainConfig))
    from minigpt.training.plan.plan import make_plan, show

    figures = make_plan(config, values.utilisation, values.measure)
    if values.json:
        print_json(figures)
    else:
        print(show(figures))
