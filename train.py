"""Train a model: the same as `minigpt train`. `python train.py --help` lists every setting."""

import sys

from minigpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
