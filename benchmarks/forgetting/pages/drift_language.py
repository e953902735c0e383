"""The page on drift in language: does it tell what was forgotten, and does it choose well?

The truth is the rise of other text's loss (WikiText-2, code) over the pre-trained model's, in nats
a token, which no measure and no rule has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from benchmarks.forgetting.language_readouts import OWN_TEXT
from benchmarks.forgetting.pages.choosing_rules import rules
from benchmarks.forgetting.pages.drift_measures import agreement_table, agreement_with, few_samples
from benchmarks.forgetting.pages.several import Studies, counts
from flowdata.report.markdown import count, table
from flowdata.study import STANDARD, Record
from flowdata.study.choices import on_whole_seeds
from flowdata.study.runs import validation_of
from flowdata.study.table import methods_and_rates

PRE_TRAINED = "pre-trained"
TEXTS = ("WikiText-2", "code")
NEARLY = 0.05  # nats of validation loss that the rivals may give away


def can_tell(records: list[Record]) -> bool:
    """Return whether a study has what the page shows: the pre-trained model, several rates."""
    methods = {record["method"] for record in records}
    rates = {record["rate"] for record in _trained(records)}
    has_texts = f"{TEXTS[0]} nll" in records[0]["retained"]
    return has_texts and {PRE_TRAINED, STANDARD} <= methods and len(rates) > 1


def rise(records: list[Record], text: str) -> Callable[[Record], float]:
    """Return what tells a run's rise of a text's loss over the pre-trained model's, in nats.

    Args:
        records: a study's; the pre-trained model's losses of this text are the same on all seeds.
        text: one of `TEXTS`.
    """
    before = next(record for record in records if record["method"] == PRE_TRAINED)
    name = f"{text} nll"
    return lambda record: float(record["retained"][name] - before["retained"][name])


def drift_page(studies: Studies) -> str:
    """Return a Markdown page on the drift in the studies of language."""
    lines = [
        "# Drift in language: does it tell what was forgotten, and does it choose well?",
        "",
        f"SmolLM2-135M-Instruct learns: {counts(studies)}. Drift never sees WikiText-2 or code.",
        "",
        "## Does it tell?",
        "",
        "Spearman's coefficient with the rise of the loss: over all runs, and, after the stroke, "
        "the mean within one rate.",
        "",
        *_coefficients(studies),
        "",
        "The same over the runs whose loss of the text rose: those that lowered it have forgotten "
        "nothing, and no divergence tells by how much.",
        "",
        *_coefficients(studies, of_rises=True),
        "",
        "KL on a probe's first texts, over all runs, with the rise of WikiText-2:",
        "",
        *_few(studies),
        "",
        "## Does it choose well?",
        "",
        f"Rules with a least or a smallest take it among the runs within {NEARLY:g} nats of the "
        "best validation loss. The best possible run has the least sum of validation loss and rise "
        "of WikiText-2's loss. Losses in nats a token, means over the seeds, the largest rise in "
        "brackets.",
    ]
    for name, records in studies.items():
        of_standard = [r for r in records if r["method"] in (PRE_TRAINED, STANDARD)]
        for runs, kind in ((records, "all methods"), (of_standard, "standard fine-tuning alone")):
            lines += ["", f"{name}, {kind}:", "", *_choices(runs)]
    return "\n".join([*lines, ""])


def _coefficients(studies: Studies, *, of_rises: bool = False) -> list[str]:
    """A table of coefficients, of all runs or of those alone that raise a text's loss."""
    columns = {}
    for name, records in studies.items():
        for text in TEXTS:
            lost = rise(records, text)
            runs = [run for run in _trained(records) if not of_rises or lost(run) > 0]
            heading = f"{name}, {text}" + f" ({count(len(runs), 'run')})" * of_rises
            if len(runs) > 2:  # of fewer the order tells nothing
                columns[heading] = agreement_with(runs, lost)
    return agreement_table(columns) if columns else ["Too few."]


def _few(studies: Studies) -> list[str]:
    columns = {
        name: few_samples(_trained(records), rise(records, TEXTS[0]))
        for name, records in studies.items()
    }
    rows = [
        [probe, size, *(f"{each[probe][size]['kl']:.3f}" for each in columns.values())]
        for probe, sizes in next(iter(columns.values())).items()
        for size in sizes
    ]
    return table(["probe", "texts", *columns], rows)


def _choices(records: list[Record]) -> list[str]:
    rises = {text: rise(records, text) for text in TEXTS}
    worth = rises[TEXTS[0]]
    all_rules = rules(
        OWN_TEXT,
        worth=lambda run: validation_of(run) - worth(run),
        slack=NEARLY,
        untrained=PRE_TRAINED,
    )
    rows = []
    for name, rule in all_rules.items():
        runs = on_whole_seeds(rule, records)
        target = mean(run["target"]["nll"] for run in runs)
        values = [[of_text(run) for run in runs] for of_text in rises.values()]
        cells = [f"{mean(each):+.3f} ({max(each):+.3f})" for each in values]
        rows.append([name, methods_and_rates(runs), f"{target:.3f}", *cells])
    headings = ["rule", "chosen", "target", *(f"rise of {text}" for text in TEXTS)]
    return table(headings, rows, words=("chosen",))


def _trained(records: list[Record]) -> list[Record]:
    return [record for record in records if record["method"] != PRE_TRAINED]
