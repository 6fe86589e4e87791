"""The verb eval: loss, perplexity and bits per byte of a model on a text."""

from __future__ import annotations

from dataclasses import replace

from minigpt.cli.arguments import add_device, make_parser, parse, print_json, run_or_latest, split_positional
from minigpt.errors import ConfigError


def evaluate(argv: list[str]) -> None:
    """Measure loss, perplexity and bits per byte: minigpt eval RUN. By default on the validation split of the corpus
    that the model was trained on; with --data.source, on all of another text.
    """
    from minigpt.data.config import DataConfig

    path, rest = split_positional(argv)
    parser = make_parser("minigpt eval", evaluate.__doc__ or "", "[RUN]")
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    parser.set_defaults({"data.source": None, "data.folder": None})  # not given: the run's own
    parser.add_argument("--block_size", type=int, default=0, help="tokens per window; 0: the model's block_size")
    parser.add_argument("--tokens", type=int, default=0, help="number of evenly spaced tokens to measure on; 0: all")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, rest)

    from minigpt.evaluation.text import evaluate_run
    from minigpt.model.device import pick_device
    from minigpt.sampling.run import load

    data, folder = values.data, values.data.folder
    if data.source is not None:
        data = data if folder is not None else replace(data, folder=DataConfig.folder)
    elif replace(data, source=DataConfig.source, folder=DataConfig.folder) == DataConfig():
        data = None
    else:
        raise ConfigError("--data: is of another text than the run's own; add --data.source, or leave --data.* out")
    run = load(run_or_latest(path), device=pick_device(values.device))
    result, what = evaluate_run(run, data, values.block_size or None, values.tokens or None, folder)
    figures = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }
    if values.json:
        print_json({"checkpoint": str(run.path), "text": what, **figures})
    else:
        print(f"{run.path} on {what}: {result.tokens:,} tokens, {result.bytes:,} bytes")
        print(
            f"loss {result.loss:.4f} nats per token  perplexity {result.perplexity:.3f}  "
            f"{result.bits_per_byte:.4f} bits per byte"
        )
