"""The plan: a data set cut into packs."""
