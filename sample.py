"""Sample from a model: the same as `minigpt sample`. `python sample.py --help` lists every setting."""

import sys

from minigpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
