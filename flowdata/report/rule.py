"""The rule: when weights help beyond a smaller rate, and what to do instead.

Each clause stands with the figure behind it, of fine-tunings of CIFAR-10's ResNet-20 on eleven sets
of images: benchmarks/results/evidence/forgetting_rule.md has all of them, and the sets that each
clause was made on. "Kept" is the old accuracy where as much of the new task is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

FIGURES = (
    "The figures behind this: small networks on eleven sets of images, five seeds each; kept is "
    "the accuracy on the old task where as much of the new one is learned"
)


@dataclass(frozen=True)
class Clause:
    """A clause of the rule.

    Attributes:
        advice: what to do, and when.
        figure: what it rests on.
    """

    advice: str
    figure: str


RATE = Clause(
    "Choose the learning rate by drift: it decides most of what is forgotten.",
    "Chosen by drift, a new head alone being a choice too, the average of new and old accuracy "
    "was 0.5 points below the best possible at most; chosen by validation alone 7 to 32, at the "
    "smallest rate tried 0 to 7 (held on 5 of 5 sets known before, 6 of 6 others).",
)
RIGHT = Clause(
    "Where all rows are right, leave the weights out: a smaller rate keeps as much or more.",
    "FLOW kept -12.6 to -1.5 points beside plain fine-tuning (held on 2 of 2 sets known "
    "before, 3 of 3 others).",
)
AVERAGE = Clause(
    "Averaging with the model before (`wise_ft`) keeps as much or more, too, where rows are right.",
    "With a quarter of the fine-tuned weights it kept +1.3 to +13.4 points beside plain "
    "fine-tuning (held on 2 of 2 sets known before; checked on no others).",
)
WRONG = Clause(
    "Where a tenth to a third of the rows are wrong, take the weights, at the median.",
    "FLOW kept +6.1 to +25.0 points beside plain fine-tuning where a tenth to a third were "
    "wrong, +2.0 to +18.7 with BatchNorm's statistics taken anew, -13.7 where half were (held on "
    "1 of 1 sets known before, 3 of 4 others).",
)
SHARE = Clause(
    "Where you know how many are wrong, leave out as many of the hardest: as good, or better.",
    "Trimming kept -2.0 to +26.6 points beside FLOW; at equal learning the new task's hardest "
    "tenth was -9.6 to -3.6 points beside plain fine-tuning's, FLOW's -6.5 to -0.3 (held on 1 of 1 "
    "sets known before, 4 of 4 others).",
)
HARD = Clause(
    "Where hard rows are right and matter to you, leave the weights out too: the old task loses "
    "more than they gain.",
    "At equal learning FLOW's hardest tenth was -1.0 to +3.6 points beside plain fine-tuning's, "
    "its worst class -3.0 to +0.2, the old task -12.6 to -1.5; at the same rates the hardest "
    "tenth -14.5 to -5.2 (held on 5 of 5 sets known before; checked on no others).",
)
LARGE = Clause(
    "Where the rate is large and can't be lowered, try ℓ2 beside the weights (`ParameterAnchor`).",
    "At a rate of 0.03 the average of new and old accuracy was +0.9 to +26.4 points beside "
    "plain fine-tuning's; at equal learning the old task -20.2 to +23.3 (above its parts on every "
    "seed: held on 0 of 3 sets known before, 2 of 3 others).",
)
RULE = (RATE, RIGHT, AVERAGE, WRONG, SHARE, HARD, LARGE)
