"""The command line."""

from flowdata.cli.main import main

__all__ = ["main"]
