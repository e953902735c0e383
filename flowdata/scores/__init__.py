"""Scores: the losses of a data set under the pre-trained model, and what is made of them.

scores.py    the class, and the weights that a caller may pass in its place
matching.py  whether a data set is the one that was scored
table.py     scores as a table: rows, parts, a data frame, HTML
"""

from flowdata.scores.scores import Scores, weights_of

__all__ = ["Scores", "weights_of"]
