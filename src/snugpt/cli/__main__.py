"""`python -m snugpt.cli` is the command line."""

from snugpt.cli.main import main

main()
