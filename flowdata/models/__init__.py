"""Calling other people's models: their inputs, dtypes, devices and peculiarities."""
