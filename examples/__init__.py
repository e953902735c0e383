"""Runnable examples; each is under 100 lines but the vision one, which holds its network too."""
