"""`python -m kilotune`."""

from kilotune.cli.main import main

main()
