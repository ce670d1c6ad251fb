"""The command line."""

from codistill.cli.main import main

__all__ = ["main"]
