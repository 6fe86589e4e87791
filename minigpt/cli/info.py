"""The verb info: architecture, parameters and cost of a trained model."""

from __future__ import annotations

from dataclasses import asdict

from minigpt.cli.arguments import make_parser, parse, print_json, run_or_latest, split_positional


def info(argv: list[str]) -> None:
    """Show architecture, parameters, FLOPs and KV cache size of a model: minigpt info RUN. See minigpt plan for a model
    that is not trained yet.
    """
    path, rest = split_positional(argv)
    parser = make_parser("minigpt info", info.__doc__ or "", "[RUN]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    values = parse(parser, rest)
    from minigpt.checkpoint.checkpoint import read_config
    from minigpt.checkpoint.runs import read_checkpoint
    from minigpt.model.cost import cost_of
    from minigpt.terminal import readable

    model = read_checkpoint(run_or_latest(path), read_config)
    cost = cost_of(model)
    cache = cost.cache_bytes_per_token * model.block_size
    if values.json:
        figures = {"parameters": cost.parameters, "training_flops": cost.training_flops, **asdict(cost)}
        print_json({"model": model.to_dict(), **figures, "cache_bytes_per_row": cache})
        return
    for name, value in model.to_dict().items():
        print(f"{name:16} {value}")
    print(
        f"\nparameters       {cost.parameters:,} (embeddings {cost.embedding_parameters:,}, blocks "
        f"{cost.block_parameters:,}, unembedding {cost.unembedding_parameters:,})"
    )
    print(f"FLOPs per token  {readable(cost.forward_flops)} forward, {readable(cost.training_flops)} training")
    print(
        f"cache            {readable(cost.cache_bytes_per_token)}B per token, {readable(cache)}B per sequence (float32)"
    )
