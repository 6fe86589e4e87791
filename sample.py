"""Sample from a model: the same as `minigpt sample`. `python sample.py --help` lists every setting."""

import sys

from minigpt.cli.main import run

if __name__ == "__main__":
    run("sample", *sys.argv[1:])
