"""The former place of `flowdata.WeightedCollator`."""

from flowdata.collator import WeightedCollator as WeightedCollator
