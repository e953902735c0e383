"""Methods at equal learning on several sets, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from flowdata.report.markdown import table
from flowdata.study import (
    LINEAR_PROBE,
    STANDARD,
    Kept,
    Record,
    kept_at_equal_learning,
    runs_with_items,
)
from flowdata.study.table import difference

Kepts = Mapping[str, Mapping[str, Kept]]  # by set and method


def kept_on(records: list[Record], reference: str = STANDARD) -> dict[str, Kept]:
    """Return what each method keeps at equal learning on one set, by method.

    Args:
        records: runs of the set on the same seeds.
        reference: the method that the others are compared with.
    """
    kept = kept_at_equal_learning(runs_with_items(records), reference, LINEAR_PROBE)
    return {each.method: each for each in kept}


def table_of_sets(all_kept: Kepts, reference: str = STANDARD) -> list[str]:
    """Return a Markdown table of the differences from the reference, a column for each set."""
    methods = list(dict.fromkeys(name for of_set in all_kept.values() for name in of_set))
    methods.remove(reference)
    rows = []
    for method in methods:
        of_sets = [of_set.get(method) for of_set in all_kept.values()]
        rows.append([method, *("–" if each is None else difference(each) for each in of_sets)])
    return table(["method", *all_kept], rows)
