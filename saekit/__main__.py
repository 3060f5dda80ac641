"""``python -m saekit``, as launchers of processes call it."""

from saekit.cli import main

main()
