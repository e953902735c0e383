"""The page on the evidence in language: each method against standard fine-tuning, text by text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean

import numpy as np

from benchmarks.forgetting.evidence_language import PRE_TRAINED, TRIMMED
from benchmarks.forgetting.language import CLEAN_ROWS
from benchmarks.forgetting.language_readouts import OWN_TEXT
from benchmarks.forgetting.pages.drift_measures import agreement_with
from benchmarks.forgetting.pages.outcomes import FAILS, HOLDS, above, below, no_worse, on_the_front
from benchmarks.forgetting.pages.several import Studies, of_whole_seeds
from flowdata.report.markdown import count, table
from flowdata.study import STANDARD, Record
from flowdata.study.equal_learning import Difference, Items, ItemsOfRuns, differences
from flowdata.study.runs import records_by

_OLD = "WikiText-2"
_EXACT = "exact match accuracy"
_RULES = ("TALR", "DFT", "EAFT", "ASFT")
_REGISTERED = {CLEAN_ROWS, "EAFT"}  # what no study without predictions has
Pairs = Mapping[str, tuple[Difference, Difference]]  # by method, of the new and of the old


def can_tell(records: list[Record]) -> bool:
    """Return whether a study has all that the page shows: losses of texts, and what to compare."""
    methods = {record["method"] for record in records}
    has_texts = {"target", _OLD} <= records[0].get("item_losses", {}).keys()
    return has_texts and {PRE_TRAINED, STANDARD} < methods


def evidence_page(studies: Studies) -> str:
    """Return a Markdown page on methods at the rates that they share.

    Args:
        studies: those of `evidence_language`, of which predictions were registered, or of
            `language`.
    """
    lines = [
        "# When do weights help in language?",
        "",
        "SmolLM2-135M-Instruct learns GSM8K. Losses are means over texts, in nats a token. "
        "Differences are from standard fine-tuning at the same rate: the mean, and where 95 % of "
        "the draws of seeds and texts lie. What was predicted before the runs: "
        "benchmarks/forgetting/registered_evidence.md.",
    ]
    for name, records in of_whole_seeds(studies).items():
        before = [record for record in records if record["method"] == PRE_TRAINED]
        for rate, at_rate in records_by(records, "rate").items():
            if rate:
                lines += ["", f"## {name}, at a rate of {rate:g}", "", *_part([*before, *at_rate])]
    return "\n".join([*lines, ""])


def _part(records: list[Record]) -> list[str]:
    """Lines on the runs of one rate."""
    pairs = differences(runs_of_texts(records), STANDARD)
    lines = [*_table(records, pairs), "", _drift_tells(records)]
    if not pairs.keys() & _REGISTERED:
        return lines
    words = ("figure", "outcome")
    rows = [list(row) for row in predicted(records, pairs)]
    return [
        *lines,
        "",
        "What was predicted:",
        "",
        *table(["prediction", *words], rows, words=words),
    ]


def runs_of_texts(records: Iterable[Record]) -> ItemsOfRuns:
    """Return the losses of texts with the sign changed, so that more is better."""
    runs: dict[tuple[str, float], dict[int, Items]] = {}
    for record in records:
        losses = record["item_losses"]
        items = Items(*(-np.array(losses[name]) for name in ("target", _OLD)))
        runs.setdefault((record["method"], record["rate"]), {})[record["seed"]] = items
    return runs


def _table(records: list[Record], pairs: Pairs) -> list[str]:
    rows, by_method = [], records_by(records, "method")
    for method in dict.fromkeys(record["method"] for record in records):
        of_method = by_method[method]
        losses = [mean(_mean_loss(r, name) for r in of_method) for name in ("target", _OLD)]
        new, old = (_cell(each) for each in pairs[method]) if method in pairs else ("–", "–")
        kl = mean(r["drift"][OWN_TEXT]["kl"] for r in of_method)
        answers = [r["target"][_EXACT] for r in of_method if _EXACT in r["target"]]
        right = f"{mean(answers):.1f}" if answers else "–"
        seeds = str(len(of_method))
        rows.append(
            [method, seeds, f"{losses[0]:.3f}", new, f"{losses[1]:.3f}", old, f"{kl:.4f}", right]
        )
    figures = ["test loss", "test difference", f"{_OLD} loss", f"{_OLD} difference"]
    return table(["method", "seeds", *figures, "KL on own text", "right answers, %"], rows)


def _drift_tells(records: list[Record]) -> str:
    """How the order of the runs by drift agrees with that by what was forgotten."""
    trained = [record for record in records if record["method"] != PRE_TRAINED]
    coefficients = agreement_with(trained, lambda record: _mean_loss(record, _OLD))
    words = (f"{probe} {coefficients[f'kl, {probe}'][0]:.2f}" for probe in trained[0]["drift"])
    return (
        f"Spearman's coefficient of the drift's KL with {_OLD}'s loss, over the "
        f"{count(len(trained), 'run')} of this one rate: {', '.join(words)}."
    )


def _mean_loss(record: Record, name: str) -> float:
    return float(np.mean(record["item_losses"][name]))


def _cell(loss: Difference) -> str:
    """A difference of losses: that of scores with the sign changed."""
    return f"{-loss.difference:+.3f} ({-loss.high:+.3f} to {-loss.low:+.3f})"


def predicted(records: list[Record], pairs: Pairs) -> Iterable[tuple[str, str, str]]:
    """Yield the number of each prediction, the figure that it is judged by, and the outcome."""
    if CLEAN_ROWS in pairs:
        against_flow = differences(runs_of_texts(records), "FLOW")
        yield "8, test loss", _cell(pairs["FLOW"][0]), above(pairs["FLOW"][0])
        yield f"8, {_OLD}", _cell(pairs["FLOW"][1]), no_worse(pairs["FLOW"][1])
        yield "9", _cell(against_flow[TRIMMED][0]), on_the_front(against_flow[TRIMMED][0])
        yield "10", _cell(against_flow[CLEAN_ROWS][0]), no_worse(against_flow[CLEAN_ROWS][0])
        steps = pairs["standard, smaller steps"][0]
        yield "11", _cell(steps), on_the_front(steps)
    for rule in (rule for rule in _RULES if rule in pairs):
        yield f"12, {rule}, test loss", _cell(pairs[rule][0]), below(pairs[rule][0])
        yield f"12, {rule}, drift", *_more_drift(records, rule)


def _more_drift(records: list[Record], rule: str) -> tuple[str, str]:
    """The drift of a rule less standard fine-tuning's, and whether it is more on each seed."""
    by_method = records_by(records, "method")
    of_rule, of_standard = (
        {r["seed"]: r["drift"][OWN_TEXT]["kl"] for r in by_method[name]}
        for name in (rule, STANDARD)
    )
    seeds = sorted(of_rule.keys() & of_standard.keys())
    more = [of_rule[seed] - of_standard[seed] for seed in seeds]
    return f"{mean(more):+.4f} nats", HOLDS if min(more) > 0 else FAILS
