"""Train a model: the same as `minigpt train`. `python train.py --help` lists every setting."""

import sys

from minigpt.cli.main import run

if __name__ == "__main__":
    run("train", *sys.argv[1:])
