"""The verb plan: estimate what a training run will cost."""

from __future__ import annotations

from minigpt.cli.arguments import add_training_settings, fields_of, make_parser, parse, print_json


def plan(argv: list[str]) -> None:
    """Estimate memory, FLOPs and time of a training run: minigpt plan --config NAME --model.n_layer 6. Times are for
    this machine and for several GPUs. Nothing is trained.
    """
    from minigpt.training.config import TrainConfig

    parser = make_parser("minigpt plan", plan.__doc__ or "")
    add_training_settings(parser)
    parser.add_argument("--utilisation", type=float, default=0.4, help="assumed fraction of a device's peak FLOPs")
    parser.add_argument(
        "--measure",
        type=bool | None,
        default=None,
        help="time a few steps on this machine; null: only if that is quick",
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
