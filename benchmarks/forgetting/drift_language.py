"""Does drift tell what a language model forgets, and does it choose well? From a study's records.

The truth is the rise of the loss of other text (WikiText-2, code) over the pre-trained model's, in
nats a token, which no measure and no rule below has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import mean
from typing import TypeAlias

from flowdata.study import STANDARD, Record, choices
from flowdata.study.extras import load_extra
from flowdata.study.runs import validation_of
from flowdata.study.table import row

PRE_TRAINED = "pre-trained"
TEXTS = ("WikiText-2", "code")
MOST_FORGOTTEN = 0.02  # nats of WikiText-2: what the chosen run may lose
NEARLY = 0.05  # nats of the validation loss: as good as the best
Rises: TypeAlias = dict[str, float]
Rule: TypeAlias = Callable[[list[Record]], Record]


def rises(record: Record, records: Iterable[Record]) -> Rises:
    """Return the rise of each other text's loss over the pre-trained model's.

    Args:
        record: a run.
        records: the study's, the pre-trained model's among them.

    Raises:
        ValueError: the pre-trained model is not among the records.
    """
    before = [record for record in records if record["method"] == PRE_TRAINED]
    if not before:
        raise ValueError(f"records have no {PRE_TRAINED!r} model to compare with: run it too")
    old, new = before[0]["retained"], record["retained"]
    return {text: new[f"{text} nll"] - old[f"{text} nll"] for text in TEXTS}


def measures(record: Record) -> dict[str, float]:
    """Return what could tell forgetting by name: the KL by each probe, on few texts, the rivals."""
    few = {
        f"KL, {probe}, first {number}": drift["kl"]
        for probe, by_number in record["drift on few"].items()
        for number, drift in by_number.items()
    }
    probes = record["drift"].items()
    return {
        **{f"KL, {probe}": drift["kl"] for probe, drift in probes},
        **{f"1 − cosine, {probe}": 1 - drift["cosine"] for probe, drift in probes},
        **{f"1 − agreement, {probe}": 1 - drift["agreement"] for probe, drift in probes},
        **few,
        **record["rivals"],
    }


def telling(records: list[Record]) -> dict[str, dict[str, float]]:
    """Return each measure's Spearman correlation with the rise of each text's loss.

    Args:
        records: a study's, of all seeds; those of the pre-trained model are the runs' origin and
            don't count themselves.

    Returns:
        By measure: ``"WikiText-2"`` and ``"code"``, over all runs, and the same with
        ``", one rate"``: the mean over the rates, within each of which all methods count.
    """
    runs = [record for record in records if record["method"] != PRE_TRAINED]
    rise_of = {id(run): rises(run, records) for run in runs}
    rates = _groups(runs, "rate")
    return {
        name: {
            f"{text}{suffix}": mean(
                _spearman([measures(r)[name] for r in group], [rise_of[id(r)][text] for r in group])
                for group in groups
            )
            for suffix, groups in (("", [runs]), (", one rate", rates))
            for text in TEXTS
        }
        for name in measures(runs[0])
    }


def rules(records: list[Record]) -> dict[str, list[Record]]:
    """Return the run that each rule chooses among all methods and rates, one for each seed.

    The best possible run has the least sum of validation loss and rise of WikiText-2's loss.
    """

    def cost(run: Record) -> float:
        return -validation_of(run) + rises(run, records)["WikiText-2"]

    chosen = choices(records, lambda run: -cost(run))
    best = chosen.pop("best")
    for name, rule in _RIVALS.items():
        chosen[name] = [rule(runs) for runs in _groups(records, "seed")]
    return chosen | {"best possible": best}


def _smallest_rate(runs: list[Record]) -> Record:
    return min(_nearly_best(runs), key=lambda run: (run["rate"], -validation_of(run)))


def _least_distance(runs: list[Record]) -> Record:
    return min(_nearly_best(runs), key=lambda run: float(run["rivals"]["weight distance"]))


_RIVALS: Mapping[str, Rule] = {
    f"smallest rate within {NEARLY:g} nats": _smallest_rate,
    f"least weight distance within {NEARLY:g} nats": _least_distance,
}


def _nearly_best(runs: list[Record]) -> list[Record]:
    best = max(map(validation_of, runs))
    return [run for run in runs if validation_of(run) >= best - NEARLY]


def page(records: list[Record]) -> list[str]:
    """Return the lines of Markdown that say what tells forgetting, and what each rule chooses."""
    columns = [f"{text}{suffix}" for suffix in ("", ", one rate") for text in TEXTS]
    lines = [row(["Spearman with the rise of", *columns]), row(["---", *["---:"] * len(columns)])]
    for name, values in telling(records).items():
        lines.append(row([name, *(f"{values[column]:.2f}" for column in columns)]))
    for title, some in (("All methods", records), ("Standard fine-tuning", _of_standard(records))):
        lines += ["", f"{title}, chosen by:", "", *_choice_lines(some, records)]
    return lines


def _of_standard(records: list[Record]) -> list[Record]:
    return [record for record in records if record["method"] in (PRE_TRAINED, STANDARD)]


def _choice_lines(some: list[Record], records: list[Record]) -> list[str]:
    lines = [
        row(["rule", "chosen", "target nll", "rise of WikiText-2", "rise of code"]),
        row(["---", "---", "---:", "---:", "---:"]),
    ]
    for name, runs in rules(some).items():
        chosen = ", ".join(dict.fromkeys(f"{run['method']} {run['rate']:g}" for run in runs))
        target = mean(run["target"]["nll"] for run in runs)
        old = [mean(rises(run, records)[text] for run in runs) for text in TEXTS]
        lines.append(row([name, chosen, f"{target:.3f}", *(f"{value:+.3f}" for value in old)]))
    return lines


def _groups(runs: list[Record], key: str) -> list[list[Record]]:
    """The runs of each seed, or rate, in their order."""
    values = sorted({run[key] for run in runs})
    return [[run for run in runs if run[key] == value] for value in values]


def _spearman(values: list[float], truth: list[float]) -> float:
    stats = load_extra("scipy.stats", "rank correlations")
    return float(stats.spearmanr(values, truth).statistic)
