"""Several studies on one page: the runs of each, those of whole seeds, and how many they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

from flowdata.report.markdown import count, table
from flowdata.study import Record
from flowdata.study.runs import whole_seeds

Studies: TypeAlias = Mapping[str, list[Record]]  # the runs of each, by the name of its data


def counts(studies: Studies) -> str:
    """Return each study's name with the number of its runs and seeds, for a sentence.

    Example:
        >>> counts({"letters": [{"seed": 0}, {"seed": 1}], "digits": [{"seed": 0}]})
        'letters (2 runs, 2 seeds), digits (1 run, 1 seed)'
    """
    return ", ".join(
        f"{name} ({count(len(records), 'run')}, {count(len({r['seed'] for r in records}), 'seed')})"
        for name, records in studies.items()
    )


def of_whole_seeds(studies: Studies) -> Studies:
    """Return the studies without the runs of seeds that lack some, each in the seeds' order."""
    return {
        name: list(chain.from_iterable(whole_seeds(records).values()))
        for name, records in studies.items()
    }


def table_of_studies(heading: str, studies: Studies, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table with a column for each study; its first row counts their seeds.

    Args:
        heading: of the first column.
        studies: the runs of each, of whole seeds, so that all cells of a study have as many.
        rows: the cells of each, the row's name first.
    """
    seeds = (str(len({record["seed"] for record in records})) for records in studies.values())
    return table([heading, *studies], [["seeds", *seeds], *rows])


def table_by_rate(
    studies: Studies, methods: Sequence[str], cell: Callable[[list[Record]], str]
) -> list[str]:
    """Return a Markdown table with a row for each method and rate, and a column for each study.

    Args:
        studies: the runs of each.
        methods: whose runs are shown, in this order.
        cell: the runs of a method at a rate in one study, one or more → what stands in its cell.
    """
    by_run: dict[tuple[int, float], dict[str, list[Record]]] = {}
    for name, records in studies.items():
        for record in records:
            if record["method"] in methods:
                row = by_run.setdefault((methods.index(record["method"]), record["rate"]), {})
                row.setdefault(name, []).append(record)
    rows = [
        [f"{methods[place]}, {rate:g}", *(cell(row[n]) if n in row else "–" for n in studies)]
        for (place, rate), row in sorted(by_run.items())
    ]
    return table_of_studies("method, rate", studies, rows)
