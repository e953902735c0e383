"""Manners of the command line: messages in its own words, options in a file, completion."""
