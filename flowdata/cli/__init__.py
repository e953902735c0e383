"""The command line."""

from flowdata.cli.commands import main

__all__ = ["main"]
