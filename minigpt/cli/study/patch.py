"""The verb patch: activation patching between two prompts."""

from __future__ import annotations

from minigpt.cli.arguments import parse, split_positional
from minigpt.cli.study.opening import open_study, show, study_parser
from minigpt.errors import ConfigError


def patch(argv: list[str]) -> None:
    """Activation patching between two prompts: minigpt patch RUN --clean A --corrupted B --answer X. Runs the model on
    B with one activation at a time replaced by its value on A, and shows how much of the answer's logit is restored.
    """
    path, rest = split_positional(argv)
    parser = study_parser("patch", patch)
    parser.add_argument("--clean", type=str, help="prompt that the answer follows")
    parser.add_argument("--corrupted", type=str, help="prompt of as many tokens that the answer does not follow")
    parser.add_argument("--answer", type=str, help="the answer, one token")
    parser.add_argument(
        "--versus", type=str | None, default=None, help="token whose logit is subtracted from the answer's"
    )
    parser.add_argument(
        "--position", type=int, default=-1, help="position whose prediction is measured; -1 is the last"
    )
    parser.add_argument(
        "--at",
        type=str,
        default="resid_pre",
        help="activation to patch: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v or pattern",
    )
    parser.add_argument(
        "--by",
        type=str | None,
        default=None,
        help="patch each head, pos or head,pos separately, in addition to each layer",
    )
    parser.add_argument("--guess", action="store_true", help="attribution patching: estimate by gradients as well")
    values = parse(parser, rest)
    for name in ("clean", "corrupted", "answer"):
        if getattr(values, name) is None:
            raise ConfigError(f"--{name}: not given; patch needs --clean TEXT --corrupted TEXT --answer TOKEN")
    from minigpt.internals.causal.effect import logit_difference

    study = open_study(path, values)
    metric = logit_difference(values.answer, values.versus, values.position)
    way = study.attribution_patch if values.guess else study.patch
    show(values, way(values.clean, values.corrupted, metric, values.at, values.by))
