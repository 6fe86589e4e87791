"""The verb prepare: tokenize a text into the shards that training reads."""

from __future__ import annotations

from minigpt.cli.arguments import fields_of, make_parser, parse


def prepare(argv: list[str]) -> None:
    """Tokenize a corpus into memory-mapped shards: minigpt prepare --data.source FILE --tokenizer.kind bpe. Prints
    counts. Training does this automatically and reuses what was prepared.
    """
    from minigpt.training.config import TrainConfig

    parser = make_parser("minigpt prepare", prepare.__doc__ or "")
    parser.add_class_arguments(TrainConfig, skip=set(fields_of(TrainConfig(), TrainConfig)) - {"data", "tokenizer"})
    values = parse(parser, argv)
    from minigpt.data.prepare import prepare as prepare_corpus

    corpus = prepare_corpus(values.data, values.tokenizer)
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        counts = corpus.counts[split]
        bytes_a_token = counts["bytes"] / max(1, len(stream))
        print(
            f"{split:5}  {counts['documents']:,} documents  {counts['bytes']:,} bytes  {len(stream):,} tokens "
            f"({bytes_a_token:.2f} bytes per token)"
        )
    print(f"vocabulary {corpus.tokenizer.vocab_size:,}  folder {corpus.folder}")
