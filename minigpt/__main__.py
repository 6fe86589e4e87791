"""`python -m minigpt`: the same as the `minigpt` command."""

from minigpt.cli.main import run

run()
