"""Allow ``python -m nervure.cli``."""

from nervure.cli.main import main

main()
