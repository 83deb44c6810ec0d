"""``python -m ticktune``."""

from ticktune.cli import program

program()
