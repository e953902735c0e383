"""Scores: the losses of a data set under the pre-trained model, and what is made of them.

scores.py      the class
given.py       scores, or weights that a caller passes in their place
of_targets.py  the weights of each sample's targets
matching.py    whether a data set is the one that was scored
counting.py    whether a part of them fits samples, by their numbers of targets
table.py       scores as a table: rows, parts, a data frame, HTML
shapes.py      the shapes of their values
"""

from flowdata.scores.given import weights_of
from flowdata.scores.scores import Scores

__all__ = ["Scores", "weights_of"]
