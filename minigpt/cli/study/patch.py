"""The verb patch: where a difference between two texts is carried."""

from __future__ import annotations

from minigpt.cli.arguments import parse, split_positional
from minigpt.cli.study.opening import open_study, show, study_parser
from minigpt.errors import ConfigError


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
