"""`python -m minigpt`, equal to the `minigpt` command."""

from minigpt.cli.main import run

run()
