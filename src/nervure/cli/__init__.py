"""Floor 9: the command line. Arguments in, exit codes out; no logic of its own."""

from nervure.cli.main import main

__all__ = ["main"]
