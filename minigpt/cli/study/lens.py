"""The verb lens: logit lens, tuned lens and Jacobian lens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from minigpt.cli.arguments import parse, split_positional
from minigpt.cli.study.opening import check_output, open_study, show, study_parser
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.internals.attribution.translators import Translators
    from minigpt.internals.study import Study

STATS = Literal["top", "probability", "rank", "loss", "entropy", "kl"]


def lens(argv: list[str]) -> None:
    """Show the prediction after every layer (logit lens): minigpt lens RUN "text". Tuned and Jacobian lenses are fitted
    first, on the run's own text, in minutes: minigpt lens RUN --kind tuned --train.
    """
    path, rest = split_positional(argv)
    text, rest = split_positional(rest)
    parser = study_parser("lens", lens, "RUN TEXT")
    parser.add_argument("--text", type=str | None, default=None, help="the text, if it is not given after RUN")
    parser.add_argument("--kind", type=Literal["logit", "tuned", "jacobian"], default="logit", help="which lens")
    parser.add_argument(
        "--stat", type=STATS, default="top", help="what each cell shows, for the next token or for --answer"
    )
    parser.add_argument(
        "--at", type=str, default="resid_pre,resid_mid,resid_post", help="activations of each block to read"
    )
    parser.add_argument("--answer", type=str | None, default=None, help="token to show instead of the next one")
    parser.add_argument("--train", action="store_true", help="fit the lens and save it in the run's folder")
    parser.add_argument(
        "--steps", type=int | None, default=None, help="with --train and tuned: training steps; null: 120"
    )
    parser.add_argument(
        "--tokens",
        type=int | None,
        default=None,
        help="with --train: tokens of text to fit on (tuned: per step); null: 1024, tuned 2048",
    )
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="file to write: .json, .csv, .npz or .html"
    )
    values = parse(parser, rest)
    text = text if values.text is None else values.text
    _check(values, text)
    check_output(values.output, ".json", ".csv", ".npz", ".html")
    study = open_study(path, values)
    if values.train:
        show(values, study.lens_quality(_made(study, values)))
        return
    assert text is not None  # _check saw to it
    if values.kind == "tuned":
        table = study.tuned_lens(text, values.at, values.stat, values.answer)
    elif values.kind == "jacobian":
        table = study.jacobian_lens(text, values.at, values.stat, values.answer)
    else:
        table = study.logit_lens(text, values.at, values.stat, values.answer)
    if values.output is not None:
        table.save(values.output)
    show(values, table)


def _check(values: Any, text: str | None) -> None:
    if values.train:
        if values.kind == "logit":
            raise ConfigError("--train: the logit lens learns nothing; add --kind tuned or --kind jacobian")
        if text is not None:
            raise ConfigError("--train: learns from the run's own text; leave the text out")
        if values.steps is not None and values.kind == "jacobian":
            raise ConfigError(f"--steps {values.steps}: is for the tuned lens; the Jacobian lens takes --tokens only")
        return
    for name in ("steps", "tokens"):
        if getattr(values, name) is not None:
            raise ConfigError(f"--{name} {getattr(values, name)}: is for --train; add it, or leave --{name} out")
    if text is None:
        raise ConfigError('lens: expected a run and a text, such as minigpt lens runs/NAME "To be, or not to be"')


def _made(study: Study, values: Any) -> Translators:
    given = {name: getattr(values, name) for name in ("steps", "tokens") if getattr(values, name) is not None}
    return study.train_tuned_lens(**given) if values.kind == "tuned" else study.fit_jacobian_lens(**given)
