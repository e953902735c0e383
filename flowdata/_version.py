"""The version, in a file of its own so that nothing imports the package for a string."""

__version__ = "0.2.0"
