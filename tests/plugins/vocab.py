"""A verb: print the vocabulary of a model."""

import minigpt
from minigpt.cli.arguments import make_parser, parse, split_positional


@minigpt.register("verb", "vocab", help="Print the tokens of a model")
def vocab(argv):
    path, rest = split_positional(argv)
    parser = make_parser("minigpt vocab", "Print the tokens of a model.", "RUN")
    parser.add_argument("--first", type=int, default=10, help="how many tokens")
    values = parse(parser, rest)
    for id, piece in enumerate(minigpt.load(path).tokenizer.pieces[: values.first]):
        print(f"{id:6} {piece!r}")
