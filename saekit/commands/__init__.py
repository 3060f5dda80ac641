"""The commands of ``saekit``, each a function that Typer reads the flags from."""
