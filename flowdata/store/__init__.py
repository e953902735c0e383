"""The store: losses on disk, what they are of, and what survives a crash. See format.py."""
